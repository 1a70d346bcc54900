#include "common/isa.h"

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastssl {
namespace {

constexpr std::array<const char*, 5> kNames{"default", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
bool cpu_has_amx_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // of CPUID leaf 7's edx
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  // Linux hands out the tile registers on demand: init_amx asks for them.
  return (edx & kAmxBf16) && (edx & kAmxTile) && at::cpu::init_amx();
}

bool cpu_has(Isa isa) {
  switch (isa) {
    case Isa::Default:
      return true;
    case Isa::Avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::Avx512:
      return cpu_has(Isa::Avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512cd");
    case Isa::Avx512Bf16:
      return cpu_has(Isa::Avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::Amx:
      return cpu_has(Isa::Avx512Bf16) && cpu_has_amx_bf16();
  }
  return false;
}
#else
bool cpu_has(Isa isa) { return isa == Isa::Default; }
#endif

Isa choose() {
  const std::string capability = at::get_cpu_capability();
  const Isa limit = capability == "AVX512" ? Isa::Amx : capability == "AVX2" ? Isa::Avx2 : Isa::Default;
  Isa best = Isa::Default;
  for (Isa isa : available()) {
    if (isa <= limit) best = isa;
  }
  return best;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{choose()};
  return isa;
}

}  // namespace

const char* name(Isa isa) { return kNames[static_cast<size_t>(isa)]; }

Isa isa_from_name(const std::string& name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK_VALUE(
      found != kNames.end(), "name must be 'default', 'avx2', 'avx512', 'avx512_bf16' or 'amx', got '", name, "'");
  return static_cast<Isa>(found - kNames.begin());
}

std::vector<Isa> built() {
  return {
      Isa::Default,
#if defined(FASTSSL_HAVE_AVX2)
      Isa::Avx2,
#endif
#if defined(FASTSSL_HAVE_AVX512)
      Isa::Avx512,
#endif
#if defined(FASTSSL_HAVE_AVX512_BF16)
      Isa::Avx512Bf16,
      Isa::Amx,
#endif
  };
}

std::vector<Isa> available() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas = built();
    std::erase_if(isas, [](Isa isa) { return !cpu_has(isa); });
    return isas;
  }();
  return found;
}

Isa current() { return chosen().load(std::memory_order_relaxed); }

void set_current(Isa isa) {
  const std::vector<Isa> isas = available();
  TORCH_CHECK_VALUE(
      std::find(isas.begin(), isas.end(), isa) != isas.end(),
      "isa must be one that this CPU has and fastssl was built for, got '",
      name(isa),
      "'");
  chosen().store(isa, std::memory_order_relaxed);
}

}  // namespace fastssl
