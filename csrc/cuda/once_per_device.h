// What has to be asked of each device once, before the first launch of a kernel.
#pragma once

#include <stdint.h>

#include <atomic>

namespace attnpool {

// Calls ask() unless it has succeeded for this device before; returns 0 or its error. CUDA keeps an
// error until it is read, and the next launch, of anything, would report it: clear() reads it.
template <typename Ask, typename Clear>
int once_per_device(std::atomic<uint64_t>& done, int device, const Ask& ask, const Clear& clear) {
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done.load(std::memory_order_relaxed) & bit) return 0;
  const int status = int(ask());
  if (status == 0) done.fetch_or(bit, std::memory_order_relaxed);
  else clear();
  return status;
}

}  // namespace attnpool
