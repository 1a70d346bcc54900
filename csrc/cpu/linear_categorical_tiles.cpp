// Gumbel noise on a tile of logits, compiled once per instruction set.
//
// With u uniform, E = -log(1 - u) is exponential and g = -log(E) is Gumbel's. A logit s wins over the best so far only if
// g > best - s, that is E < exp(s - best), and so, as u <= E, only if u < exp(s - best). Of a row's logits few do: the
// two logarithms are taken of those of them that come in a strip, one class of all rows, with one that does.
#include "linear_categorical_tiles.h"

#include "common/random.h"
#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr int kHalf = kLanes / 2;
constexpr int64_t kMostRows = 256;  // of a tile
constexpr float kLog2e = 1.44269504f;

typedef uint64_t Longs __attribute__((vector_size(kHalf * 8)));
typedef int64_t SignedLongs __attribute__((vector_size(kHalf * 8)));
typedef float HalfVec __attribute__((vector_size(kHalf * 4)));
typedef float UnalignedHalfVec __attribute__((vector_size(kHalf * 4), aligned(4), may_alias));

inline Longs mixed(Longs x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// log x of normal x > 0, with a relative error of 2e-7: x = 2^e m, 1/2 <= m^2 <= 2, log m = 2 artanh((m - 1) / (m + 1)).
inline Vec log(Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x), e = (bits - 0x3F3504F3) >> 23;
  const Vec m = reinterpret_cast<Vec>(bits - (e << 23));
  const Vec s = (m - 1.f) / (m + 1.f), z = s * s;
  Vec p = broadcast(1.f / 9);
  p = p * z + 1.f / 7;
  p = p * z + 1.f / 5;
  p = p * z + 1.f / 3;
  p = p * z + 1.f;
  return __builtin_convertvector(e, Vec) * 0.693147181f + 2.f * s * p;
}

inline Vec gumbel(Vec u) {
  const Vec rest = 1.f - u;
  const Vec E = rest == 1.f ? u : log(rest) * u / (rest - 1.f);  // as log(rest) is to the rounded 1 - u
  return -log(E);
}

void draw(const float* L, const LogitShape& shape, const float* bias, float scale, const DrawPlace& place, float* best,
          int32_t* id) {
  constexpr uint64_t kStep = 0x9E3779B97F4A7C15;
  uint64_t state[kMostRows];  // seed_at's sums, to be mixed
  float u[kMostRows], s[kMostRows];
  for (int64_t r = 0; r < shape.rows; ++r)
    state[r] = place.seed + static_cast<uint64_t>((place.row + r) * place.columns + place.column + 1) * kStep;
  for (int64_t k = 0; k < shape.count; ++k) {
    const float b = bias ? bias[k] : 0;
    const float* const logits = L + k * shape.rows;
    IntVec some = {};
    for (int64_t j = 0; j < shape.rows; j += kLanes) {
      for (int64_t i = j; i < j + kLanes; i += kHalf) {
        Longs x;
        __builtin_memcpy(&x, state + i, sizeof(x));
        const Longs next = x + kStep;
        __builtin_memcpy(state + i, &next, sizeof(x));
        const HalfVec n = __builtin_convertvector(reinterpret_cast<SignedLongs>(mixed(x) >> 1), HalfVec);
        *reinterpret_cast<UnalignedHalfVec*>(u + i) = (n + 0.5f) * 0x1p-63f;
      }
      const Vec v = (load(logits + j) + b) * scale, t = (v - load(best + j)) * kLog2e;
      store(s + j, v);
      some |= ~(load(u + j) > exp2(t > 126.f ? broadcast(126.f) : t) * 1.0001f);  // and where it is NaN
    }
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= some[i];
    if (!any) continue;
    for (int64_t j = 0; j < shape.rows; j += kLanes) {
      const Vec uniform = load(u + j), most = broadcast(1 - 0x1p-24f);
      const Vec v = load(s + j) + gumbel(uniform > most ? most : uniform), top = load(best + j);
      const IntVec better = (v > top) | (v != v), column = static_cast<int32_t>(place.column + k) - IntVec{};
      store(best + j, better ? v : top);
      store(id + j, better ? column : load(id + j));
    }
  }
}

}  // namespace

extern const CategoricalTiles categorical_tiles;
const CategoricalTiles categorical_tiles = {draw};

}  // namespace fastssl::FASTSSL_ISA
