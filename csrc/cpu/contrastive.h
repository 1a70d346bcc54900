// The plan of the contrastive losses on the CPU, open to reports and tests.
#pragma once

#include <cstdint>

namespace fastssl {

struct TilePlan {
  int threads;     // 1 where the work is too small to share
  int64_t block;   // rows and columns of a tile
  int64_t blocks;  // that many rows make the matrix
  int64_t group;   // blocks that one task takes together
};

TilePlan tile_plan(int64_t rows, int64_t dim, int threads);

}  // namespace fastssl
