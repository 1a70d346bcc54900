// The work on one row of logits, compiled once per instruction set.
//
// A row is read from memory once, chunk by chunk: while the exponentials of a chunk are taken, a later one is on its way
// to the second-level cache. (The next one would be late: its own maximum is all that lies between.) As a row's maximum
// is not known then, each lane of a vector takes them relative to its own maximum within the chunk. They stay in the
// second-level cache until the end of the row gives a factor for each lane of each chunk.
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

constexpr float kLowest = -0x1.fffffep127f;  // the maximum of nothing: minus infinity would make differences NaN

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

// A vector of a row, or what a row's end leaves of one.
struct Whole {};
struct Part {
  int64_t lanes;
};

template <typename T>
inline Vec read(Whole, const typename T::Stored* x) {
  return T::widen(x);
}

template <typename T>
inline Vec read(Part part, const typename T::Stored* x) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < part.lanes; ++i) lanes[i] = T::widen_one(x[i]);
  return load(lanes);
}

// v in the row, `filling` after its end.
inline Vec within(Whole, Vec v, float) { return v; }

inline Vec within(Part part, Vec v, float filling) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = part.lanes; i < kLanes; ++i) lanes[i] = filling;
  return load(lanes);
}

// Calls visit(part, k, i) for the vectors in columns [first, end). `kUnrolled` consecutive ones get different numbers
// i, so that each may add to a sum of its own and need not wait for the others.
constexpr int kUnrolled = 4;

template <typename Visit>
inline void vectors(int64_t first, int64_t end, Visit visit) {
  int64_t k = first;
  for (; k + kUnrolled * kLanes <= end; k += kUnrolled * kLanes)
    for (int i = 0; i < kUnrolled; ++i) visit(Whole{}, k + i * kLanes, i);
  for (; k + kLanes <= end; k += kLanes) visit(Whole{}, k, 0);
  if (k < end) visit(Part{end - k}, k, 0);
}

inline Vec total_of(const Vec (&sums)[kUnrolled]) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

// Calls visit(first, end, n) for the chunks of columns, n being where their factors are.
template <typename Visit>
inline void chunks(int64_t columns, Visit visit) {
  for (int64_t k = 0, n = 0; k < columns; k += kColumnChunk, n += kMostLanes)
    visit(k, columns - k < kColumnChunk ? columns : k + kColumnChunk, n);
}

inline void prefetch(const void* p) { __builtin_prefetch(p, /*write=*/0, /*locality=*/2); }

// Each lane's largest x in a chunk.
template <typename At>
inline Vec top_of(int64_t first, int64_t end, At at) {
  Vec tops[kUnrolled];
  for (Vec& top : tops) top = broadcast(kLowest);
  vectors(first, end, [&](auto part, int64_t k, int i) { tops[i] = max(within(part, at(part, k), kLowest), tops[i]); });
  return max(max(tops[0], tops[1]), max(tops[2], tops[3]));
}

// Each lane's largest x so far, and total = sum_k exp2(scale (x_k - top)).
struct Running {
  Vec top = broadcast(kLowest), total = {};

  void add(Vec chunk_top, Vec chunk_total, float scale) {
    const Vec before = top;
    top = max(chunk_top, top);
    total = total * exp2((before - top) * scale) + chunk_total * exp2((chunk_top - top) * scale);
  }

  // The sum about `largest`, the largest x of all lanes.
  float total_about(float largest, float scale) const { return sum(total * exp2((top - largest) * scale)); }
};

// Turns each chunk's largest x into factors of its exponentials.
inline void finish_factors(int64_t columns, float largest, float total, float scale, float* factors) {
  for (int64_t n = 0; n < factors_of_row(columns); n += kMostLanes)
    store(factors + n, exp2((load(factors + n) - largest) * scale) * (1 / total));
}

template <typename T, bool kCentered>
void teacher_row(const typename T::Stored* x, const float* center, int64_t columns, float scale,
                 const Distribution& out) {
  const auto at = [&](auto part, int64_t k) {
    const Vec v = read<T>(part, x + k);
    return kCentered ? v - read<Float32>(part, center + k) : v;
  };
  Running row;
  chunks(columns, [&](int64_t first, int64_t end, int64_t n) {
    const Vec top = top_of(first, end, at);
    Vec sums[kUnrolled] = {};
    vectors(first, end, [&](auto part, int64_t k, int i) {
      prefetch(x + k + 4 * kColumnChunk);
      const Vec e = within(part, exp2((at(part, k) - top) * scale), 0);
      store(out.data + k, e);
      sums[i] += e;
    });
    row.add(top, total_of(sums), scale);
    store(out.factors + n, top);
  });
  const float largest = max(row.top);
  finish_factors(columns, largest, row.total_about(largest, scale), scale, out.factors);
}

void teacher(const void* x, Element element, const float* center, int64_t columns, float scale,
             const Distribution& out) {
  with_element(element, [&](auto type) {
    typedef decltype(type) T;
    const auto* row = static_cast<const typename T::Stored*>(x);
    center ? teacher_row<T, true>(row, center, columns, scale, out)
           : teacher_row<T, false>(row, center, columns, scale, out);
  });
}

void add(const Distribution* targets, int64_t count, int64_t columns, const Distribution& out) {
  chunks(columns, [&](int64_t first, int64_t end, int64_t n) {
    for (int64_t k = first; k < end; k += kLanes) {
      Vec v = load(targets[0].data + k) * load(targets[0].factors + n);
      for (int64_t t = 1; t < count; ++t) v += load(targets[t].data + k) * load(targets[t].factors + n);
      store(out.data + k, v);
    }
    store(out.factors + n, broadcast(1));
  });
}

template <typename T, bool kKeep>
RowSums student_row(const typename T::Stored* x, const Distribution& target, int64_t columns, float scale,
                    const Distribution& out) {
  const auto at = [&](auto part, int64_t k) { return read<T>(part, x + k); };
  Running row;
  Vec distance = {}, mass = {};  // sum_k P_k (top / 2 - x_k / 2), and sum_k P_k, of each lane
  chunks(columns, [&](int64_t first, int64_t end, int64_t n) {
    const Vec top = top_of(first, end, at), half = 0.5f * top, factor = load(target.factors + n);
    Vec sums[kUnrolled] = {}, distances[kUnrolled] = {}, masses[kUnrolled] = {};
    vectors(first, end, [&](auto part, int64_t k, int i) {
      prefetch(x + k + 4 * kColumnChunk);
      const Vec below = within(part, half - 0.5f * at(part, k), 0), exponent = below * -scale;
      const Vec e = within(part, exp2(exponent + exponent), 0), p = load(target.data + k) * factor;
      if constexpr (kKeep) store(out.data + k, e);
      sums[i] += e;
      distances[i] += p * below;
      masses[i] += p;
    });
    const Vec half_before = 0.5f * row.top, chunk_mass = total_of(masses);
    row.add(top, total_of(sums), scale);
    const Vec half_now = 0.5f * row.top;
    distance += mass * (half_now - half_before) + total_of(distances) + chunk_mass * (half_now - half);
    mass += chunk_mass;
    if constexpr (kKeep) store(out.factors + n, top);
  });
  const float largest = max(row.top), total = row.total_about(largest, scale);
  if constexpr (kKeep) finish_factors(columns, largest, total, scale, out.factors);
  return {total, sum(distance + mass * (0.5f * largest - 0.5f * row.top))};
}

RowSums student(const void* x, Element element, const Distribution& target, int64_t columns, float scale,
                const Distribution& out) {
  return with_element(element, [&](auto type) {
    typedef decltype(type) T;
    const auto* row = static_cast<const typename T::Stored*>(x);
    return out.data ? student_row<T, true>(row, target, columns, scale, out)
                    : student_row<T, false>(row, target, columns, scale, out);
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

template <typename T>
inline void stream(Whole, typename T::Stored* p, Vec v) {
  stream(p, T::narrow(v));
}

template <typename T>
inline void write(Whole, typename T::Stored* p, Vec v) {
  const auto narrow = T::narrow(v);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

template <typename T>
inline void write(Part part, typename T::Stored* p, Vec v) {
  for (int64_t i = 0; i < part.lanes; ++i) p[i] = T::narrow_one(v[i]);
}

template <typename T>
inline void stream(Part part, typename T::Stored* p, Vec v) {
  write<T>(part, p, v);
}

void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void gradient(const Distribution& q, float q_factor, const Distribution& p, float p_factor, int64_t columns,
              Element element, bool streamed, void* out_) {
  with_element(element, [&](auto type) {
    typedef decltype(type) T;
    auto* const out = static_cast<typename T::Stored*>(out_);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(*out)) == 0;
    chunks(columns, [&](int64_t first, int64_t end, int64_t n) {
      const Vec of_q = load(q.factors + n) * q_factor, of_p = load(p.factors + n) * p_factor;
      const auto write_by = [&](auto write) {
        vectors(first, end, [&](auto part, int64_t k, int) {
          write(part, out + k, load(q.data + k) * of_q - load(p.data + k) * of_p);
        });
      };
      streamed && aligned ? write_by([](auto part, auto* to, Vec v) { stream<T>(part, to, v); })
                          : write_by([](auto part, auto* to, Vec v) { write<T>(part, to, v); });
    });
  });
}

}  // namespace

extern const DistillationTiles distillation_tiles;
const DistillationTiles distillation_tiles = {teacher, add, student, gradient, finish_streams};

}  // namespace fastssl::FASTSSL_ISA
