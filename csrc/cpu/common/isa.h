// Instruction sets: those this library was built for, those the CPU has, and the one that the kernels use.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

namespace fastssl {

// In ascending order. Amx runs Avx512Bf16's kernels, with oneDNN's AMX products.
enum class Isa { Default, Avx2, Avx512, Avx512Bf16, Amx };

const char* name(Isa isa);
Isa isa_from_name(const std::string& name);

// In ascending order, never empty.
std::vector<Isa> built();
std::vector<Isa> available();  // those of built() that this CPU can run

// What the kernels use: the best one available within PyTorch's own choice (ATEN_CPU_CAPABILITY), until set_current is
// called.
Isa current();
void set_current(Isa isa);

// The table `name`, declared with FASTSSL_TABLE, of the instruction set in use.
#define FASTSSL_TABLE_IN_USE(name) \
  table_in_use(&baseline::name, FASTSSL_AVX2(name), FASTSSL_AVX512(name), FASTSSL_AVX512_BF16(name))

#if defined(FASTSSL_HAVE_AVX2)
#define FASTSSL_AVX2(name) &avx2::name
#else
#define FASTSSL_AVX2(name) nullptr
#endif
#if defined(FASTSSL_HAVE_AVX512)
#define FASTSSL_AVX512(name) &avx512::name
#else
#define FASTSSL_AVX512(name) nullptr
#endif
#if defined(FASTSSL_HAVE_AVX512_BF16)
#define FASTSSL_AVX512_BF16(name) &avx512_bf16::name
#else
#define FASTSSL_AVX512_BF16(name) nullptr
#endif

template <typename Table>
using OrNull = const std::type_identity_t<Table>*;  // `nullptr`, too, from which no Table is deduced

template <typename Table>
const Table& table_in_use(
    const Table* baseline, OrNull<Table> avx2, OrNull<Table> avx512, OrNull<Table> avx512_bf16) {
  const Isa isa = current();
  if (isa >= Isa::Avx512Bf16) return *avx512_bf16;
  if (isa == Isa::Avx512) return *avx512;
  if (isa == Isa::Avx2) return *avx2;
  return *baseline;
}

}  // namespace fastssl
