// The work on one row of logits, compiled once per instruction set. A row of 65,536 logits stays in the second-level
// cache from the search for its maximum to its gradient.
#include "distillation/distillation_tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/convert.h"
#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {
namespace {

typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

constexpr float kNegativeInfinity = -__builtin_inff();

// The conversions of common/convert.h, for vectors.
struct Float32 {
  typedef float Stored;
  static Vec widen(const float* p) { return load(p); }
  static float widen_one(float x) { return x; }
  static Vec narrow(Vec v) { return v; }
  static float narrow_one(float x) { return x; }
};

struct BFloat16 {
  typedef uint16_t Stored;
  static Vec widen(const uint16_t* p) {
    return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(p), Bits) << 16);
  }
  static float widen_one(uint16_t x) { return bfloat16_to_float(x); }
  static Halves narrow(Vec v) {
    const Bits u = reinterpret_cast<Bits>(v);
    const Bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Halves);
  }
  static uint16_t narrow_one(float x) { return float_to_bfloat16(x); }
};

struct Float16 {
  typedef uint16_t Stored;
  static Vec widen(const uint16_t* p) {
    const Bits h = __builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(p), Bits);
    const Bits magnitude = (h & 0x7fff) << 13;
    const Bits scaled = reinterpret_cast<Bits>(reinterpret_cast<Vec>(magnitude) * 0x1p112f);
    const Bits special = magnitude >= 0x0f800000 ? Bits{} + 0x7f800000 : Bits{};
    return reinterpret_cast<Vec>(scaled | special | (h & 0x8000) << 16);
  }
  static float widen_one(uint16_t x) { return half_to_float(x); }
  static Halves narrow(Vec v) {
    const Bits u = reinterpret_cast<Bits>(v), magnitude = u & 0x7fffffff;
    const Bits scaled = reinterpret_cast<Bits>(reinterpret_cast<Vec>(magnitude) * 0x1p-112f);
    Bits rounded = (scaled + 0xfff + ((scaled >> 13) & 1)) >> 13;
    rounded = magnitude >= 0x477ff000 ? (v == v ? Bits{} + 0x7c00 : Bits{} + 0x7e00) : rounded;
    return __builtin_convertvector(rounded | (u >> 16 & 0x8000), Halves);
  }
  static uint16_t narrow_one(float x) { return float_to_half(x); }
};

// Calls f with the type above that stands for `element`.
template <typename F>
inline auto with_element(Element element, F f) {
  if (element == Element::Float32) return f(Float32{});
  if (element == Element::BFloat16) return f(BFloat16{});
  return f(Float16{});
}

// The last vector of a row whose length is not a multiple of the lanes, with `filling` after the row's end.
template <typename T>
inline Vec last(const typename T::Stored* x, int64_t columns, int64_t k, float filling) {
  float rest[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) rest[i] = k + i < columns ? T::widen_one(x[k + i]) : filling;
  return load(rest);
}

// v where k + lane < columns, else 0.
inline Vec within(Vec v, int64_t columns, int64_t k) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = columns - k; i < kLanes; ++i) lanes[i] = 0;
  return load(lanes);
}

// Calls `visit` for all full vectors. `kUnrolled` consecutive ones get different numbers, so that each may add to a sum
// of its own and need not wait for the others.
constexpr int kUnrolled = 4;

template <typename Visit>
inline int64_t full_vectors(int64_t columns, Visit visit) {
  int64_t k = 0;
  for (; k + kUnrolled * kLanes <= columns; k += kUnrolled * kLanes)
    for (int i = 0; i < kUnrolled; ++i) visit(k + i * kLanes, i);
  for (; k + kLanes <= columns; k += kLanes) visit(k, 0);
  return k;
}

inline Vec total_of(const Vec (&sums)[kUnrolled]) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

template <typename T, bool kCentered>
float teacher_row(const typename T::Stored* x, const float* center, int64_t columns, float scale, float* exps) {
  const auto at = [&](int64_t k) { return kCentered ? T::widen(x + k) - load(center + k) : T::widen(x + k); };
  const auto last_at = [&](int64_t k, float filling) {
    const Vec v = last<T>(x, columns, k, filling);
    return kCentered ? v - last<Float32>(center, columns, k, 0) : v;
  };
  Vec peaks[kUnrolled];
  for (Vec& peak : peaks) peak = broadcast(kNegativeInfinity);
  int64_t k = full_vectors(columns, [&](int64_t k, int i) { peaks[i] = max(peaks[i], at(k)); });
  if (k < columns) peaks[0] = max(peaks[0], last_at(k, kNegativeInfinity));
  const float peak = max(max(max(peaks[0], peaks[1]), max(peaks[2], peaks[3])));

  Vec sums[kUnrolled] = {};
  k = full_vectors(columns, [&](int64_t k, int i) {
    const Vec e = exp2((at(k) - peak) * scale);
    store(exps + k, e);
    sums[i] += e;
  });
  if (k < columns) {
    const Vec e = within(exp2((last_at(k, 0) - peak) * scale), columns, k);
    store(exps + k, e);
    sums[0] += e;
  }
  return sum(total_of(sums));
}

float teacher(const void* x, Element element, const float* center, int64_t columns, float scale, float* exps) {
  return with_element(element, [&](auto type) {
    typedef decltype(type) T;
    const auto* row = static_cast<const typename T::Stored*>(x);
    return center ? teacher_row<T, true>(row, center, columns, scale, exps)
                  : teacher_row<T, false>(row, center, columns, scale, exps);
  });
}

void add(const Target* targets, int64_t count, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; k += kLanes) {
    Vec v = load(targets[0].data + k) * targets[0].factor;
    for (int64_t t = 1; t < count; ++t) v += load(targets[t].data + k) * targets[t].factor;
    store(out + k, v);
  }
}

template <typename T, bool kKeep>
RowSums student_row(const typename T::Stored* x, const Target& target, int64_t columns, float scale, float* exps) {
  Vec peaks[kUnrolled];
  for (Vec& peak : peaks) peak = broadcast(kNegativeInfinity);
  int64_t k = full_vectors(columns, [&](int64_t k, int i) { peaks[i] = max(peaks[i], T::widen(x + k)); });
  if (k < columns) peaks[0] = max(peaks[0], last<T>(x, columns, k, kNegativeInfinity));
  const float peak = max(max(max(peaks[0], peaks[1]), max(peaks[2], peaks[3])));

  Vec sums[kUnrolled] = {}, distances[kUnrolled] = {};
  const auto visit = [&](int64_t k, int i, Vec below, Vec e) {
    if constexpr (kKeep) store(exps + k, e);
    sums[i] += e;
    distances[i] += load(target.data + k) * below;
  };
  k = full_vectors(columns, [&](int64_t k, int i) {
    const Vec below = 0.5f * peak - 0.5f * T::widen(x + k), exponent = below * -scale;
    visit(k, i, below, exp2(exponent + exponent));
  });
  if (k < columns) {
    const Vec below = 0.5f * peak - 0.5f * last<T>(x, columns, k, 0), exponent = below * -scale;
    visit(k, 0, within(below, columns, k), within(exp2(exponent + exponent), columns, k));
  }
  return {sum(total_of(sums)), sum(total_of(distances)) * target.factor};
}

RowSums student(const void* x, Element element, const Target& target, int64_t columns, float scale, float* exps) {
  return with_element(element, [&](auto type) {
    typedef decltype(type) T;
    const auto* row = static_cast<const typename T::Stored*>(x);
    return exps ? student_row<T, true>(row, target, columns, scale, exps)
                : student_row<T, false>(row, target, columns, scale, exps);
  });
}

// Stores bypassing the cache, to an address that is a multiple of the vector's size.
inline void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__SSE2__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
  store(p, v);
#endif
}

inline void stream(uint16_t* p, Halves h) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(h));
#elif defined(__AVX__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(h));
#elif defined(__SSE2__)
  _mm_stream_si64(reinterpret_cast<long long*>(p), reinterpret_cast<int64_t>(h));
#else
  *reinterpret_cast<UnalignedHalves*>(p) = h;
#endif
}

inline void write(float* p, Vec v) { store(p, v); }

inline void write(uint16_t* p, Halves h) { *reinterpret_cast<UnalignedHalves*>(p) = h; }

void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void gradient(const float* exps, float exps_factor, const float* target, float target_factor, int64_t columns,
              Element element, bool streamed, void* out_) {
  with_element(element, [&](auto type) {
    typedef decltype(type) T;
    auto* const out = static_cast<typename T::Stored*>(out_);
    const auto at = [&](int64_t k) { return load(exps + k) * exps_factor - load(target + k) * target_factor; };
    const bool aligned = reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(*out)) == 0;
    const int64_t k = streamed && aligned
        ? full_vectors(columns, [&](int64_t k, int) { stream(out + k, T::narrow(at(k))); })
        : full_vectors(columns, [&](int64_t k, int) { write(out + k, T::narrow(at(k))); });
    for (int64_t i = k; i < columns; ++i)
      out[i] = T::narrow_one(exps[i] * exps_factor - target[i] * target_factor);
  });
}

}  // namespace

extern const DistillationTiles distillation_tiles;
const DistillationTiles distillation_tiles = {teacher, add, student, gradient, finish_streams};

}  // namespace fastssl::FASTSSL_ISA
