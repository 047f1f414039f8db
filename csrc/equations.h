// The elementwise equations of the three passes for one pair (query, key), on scalars (CUDA) or on
// vectors (CPU). Numbers (F1) ... (D13) refer to the list in attnpool_kernels/autograd.py.
//   s logit, lse log-sum-exp of its row, p weight, r keep factor (0 or 1 / (1 - dropout))
//   delta = rowsum(O dO), delta_l = delta - dlse
#pragma once

#include "params.h"

namespace attnpool {

// (B1) dp = r * (dO . v)   (B3) ds = p (dp - delta')
template <typename T>
ATTN_HD T score_gradient(T p, T dp, T delta_l) {
  return p * (dp - delta_l);
}

// (D4) y = s1 - (delta + delta') t + w, with the row sums s1 = sum p t dp and w = sum p g
template <typename T>
ATTN_HD T row_offset(T s1, T delta, T delta_l, T t, T w) {
  return s1 - (delta + delta_l) * t + w;
}

// (D5) u = p (T - t)
template <typename T>
ATTN_HD T weight_cotangent(T p, T tangent, T t) {
  return p * (tangent - t);
}

// (D6) z = p (T (dp - delta') - t dp + g - y)
template <typename T>
ATTN_HD T score_second_gradient(T p, T tangent, T dp, T delta_l, T t, T g, T y) {
  return p * (tangent * (dp - delta_l) - t * dp + g - y);
}

// (D6) with T - t taken first, which cancels less: T (dp - delta') - t dp - y equals
// (T - t)(dp - delta') - y', where y' = s1 - delta t + w = sum p (T - t)(dp - delta) + w.
template <typename T>
ATTN_HD T centred_second_gradient(T p, T centred, T dp, T delta_l, T g, T y) {
  return p * (centred * (dp - delta_l) + (g - y));
}

}  // namespace attnpool
