// The host's side of the CUDA kernels, free of torch and of CUDA headers: what a pass may be asked,
// which instance serves it, and the three calls. `stream` is a cudaStream_t; the results are 0 or a
// cudaError_t.
#pragma once

#include "kernel_params.h"

namespace attnpool {

int launch_forward(const KernelParams& p, void* stream);
int launch_backward(const KernelParams& p, void* stream);
int launch_double_backward(const KernelParams& p, void* stream);

constexpr int64_t MAX_DIM = 128;                // of head_dim and value_dim
constexpr int64_t MAX_ROWS = INT32_MAX - 1024;  // queries, keys, molecules; offsets: 64 bits
constexpr int64_t SUM_CHUNK = 64;               // molecules of one part of d(seeds)

}  // namespace attnpool
