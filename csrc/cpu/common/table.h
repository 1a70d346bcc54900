// Declares `const Table name`, a table of functions that a *_tiles.cpp defines once per instruction set.
#pragma once

#define FASTSSL_TABLE(Table, name)                  \
  namespace baseline { extern const Table name; }   \
  namespace avx2 { extern const Table name; }       \
  namespace avx512 { extern const Table name; }     \
  namespace avx512_bf16 { extern const Table name; }
