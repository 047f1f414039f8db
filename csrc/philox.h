// Keep mask of the attention weights: Philox4x32-10 (Salmon et al., SC 2011), stateless, so that
// every backend and tile draws the same word for the same (seed, molecule, head, query, key).
// The specification in plain torch is attnpool_kernels/dropout.py.
#pragma once

#include "params.h"

namespace attnpool {

struct PhiloxWords {
  uint32_t word[4];
};

struct PhiloxKey {
  uint32_t low, high;
};

ATTN_HD PhiloxKey philox_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

ATTN_HD PhiloxWords philox(PhiloxKey key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key.low;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key.high;
    c3 = static_cast<uint32_t>(a);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The four words of keys 4 * (j >> 2) ... + 3 of a molecule; the word of key j is word[j & 3].
ATTN_HD PhiloxWords keep_words(PhiloxKey key, int64_t molecule, int64_t head, int64_t query,
                               int64_t j) {
  return philox(key, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(query),
                static_cast<uint32_t>(head), static_cast<uint32_t>(molecule));
}

}  // namespace attnpool
