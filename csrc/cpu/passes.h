// The passes of one vector width; kernels.cpp puts them into its table.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace attnpool {
namespace ATTN_ISA {

void forward(const AttnParams& a, const Task& task, void* scratch);
size_t forward_scratch(const AttnParams& a);
void merge_parts(const AttnParams& a, const SumOfParts& parts, int64_t head);
void backward(const AttnParams& a, const Task& task, void* scratch);
void norms(const AttnParams& a, const Task& task, void* scratch);
size_t backward_scratch(const AttnParams& a, int64_t longest);
void statistics(const AttnParams& a, const Task& task, void* scratch);
void double_backward(const AttnParams& a, const Task& task, void* scratch);
size_t double_backward_scratch(const AttnParams& a, int64_t longest);

}  // namespace ATTN_ISA
}  // namespace attnpool
