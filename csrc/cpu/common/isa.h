// Instruction sets: what this library was built for, what the CPU has, and which the kernels use.
#pragma once

#include <string>
#include <vector>

namespace fastssl {

// In ascending order. Amx runs Avx512Bf16's kernels, with oneDNN's AMX products.
enum class Isa { Default, Avx2, Avx512, Avx512Bf16, Amx };

const char* name(Isa isa);
Isa isa_from_name(const std::string& name);

// In ascending order, never empty.
std::vector<Isa> built();
std::vector<Isa> available();  // of those built, what this CPU can run

// What kernels use: the best available within PyTorch's own choice (ATEN_CPU_CAPABILITY), until set_current.
Isa current();
void set_current(Isa isa);

}  // namespace fastssl
