// The loops of one vector width that measure what a machine can do; see peak_loops.cpp.
#pragma once

#include <stdint.h>

namespace attnpool {

struct Loops {
  // `steps` (rounded up to whole loops) of x = x * factor + summand on many chains; their sum.
  double (*multiply_adds)(bool wide, int64_t steps, double factor, double summand);
  double (*flops)(bool wide, int64_t steps);  // that such a call computes; wide: float64
  uint64_t (*read)(const char* from, int64_t bytes);  // the bits that are set anywhere
};

#if defined(__x86_64__)
namespace avx512 {
extern const Loops loops;
}
namespace avx2 {
extern const Loops loops;
}
#endif
namespace baseline {
extern const Loops loops;
}

}  // namespace attnpool
