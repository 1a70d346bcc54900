// Random numbers by their position (SplitMix64): the i-th of a seed, the same one on every device. fastssl/ops/_random.py
// has them in PyTorch.
#pragma once

#include <cstdint>

namespace fastssl {

inline uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// A seed for position i.
inline uint64_t seed_at(uint64_t seed, int64_t i) {
  return mix(seed + (static_cast<uint64_t>(i) + 1) * 0x9E3779B97F4A7C15);
}

// The i-th random number of a seed, 63 bits.
inline uint64_t number(uint64_t seed, int64_t i) { return seed_at(seed, i) >> 1; }

}  // namespace fastssl
