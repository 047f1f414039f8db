// Which kernels exist: RUN<T, D>::run for every dtype and width. D holds head_dim and value_dim.
#pragma once

#include "warp.cuh"

namespace attnpool {

template <template <typename, int> class RUN, typename T>
int for_width(const KernelParams& p, void* stream) {
  const int64_t widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (widest <= 32) return RUN<T, 32>::run(p, stream);
  if constexpr (sizeof(T) < 8) {  // float64 is for checks: two widths do
    if (widest <= 64) return RUN<T, 64>::run(p, stream);
  }
  return RUN<T, 128>::run(p, stream);
}

template <template <typename, int> class RUN>
int for_instance(const KernelParams& p, void* stream) {
#ifdef ATTN_ONLY_TYPE  // one instance alone, for a report within seconds
  return RUN<ATTN_ONLY_TYPE, ATTN_ONLY_WIDTH>::run(p, stream);
#else
  switch (p.dtype) {
    case Dtype::float16: return for_width<RUN, Half>(p, stream);
    case Dtype::bfloat16: return for_width<RUN, Bfloat16>(p, stream);
    case Dtype::float32: return for_width<RUN, float>(p, stream);
    case Dtype::float64: return for_width<RUN, double>(p, stream);
  }
  return -1;
#endif
}

}  // namespace attnpool
