// What the losses on masked patches do to one patch: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/table.h"
#include "common/product_tiles.h"

namespace fastssl {

// The sizes of a patch, and the strides, in elements, of the images to which it belongs.
struct PatchShape {
  int64_t channels, frames, rows, columns;
  int64_t channel, frame, row, column;

  int64_t elements() const { return channels * frames * rows * columns; }
};

enum class Norm : int { None, Patch, Channel };
enum class Loss : int { SmoothL1, Cosine, MeanSquare };

// The rows to compare: `count` elements with unit stride.
struct Compared {
  const void* pred;
  Element pred_element;
  const void* target;
  Element target_element;
  int64_t count;
  const void* next_pred;  // prefetched meanwhile
};

struct PatchTiles {
  // The patch that begins at `image`, normalised, in the order (frame, row, column, channel). `spare` has room for
  // twice its elements, and holds the result. Meanwhile the patch that begins at `next` is prefetched.
  const float* (*target)(const void* image, Element element, const PatchShape& shape, Norm norm, const void* next,
                         float* spare);

  // `spare`: twice the count.
  float (*loss)(const Compared& rows, Loss loss, float beta, float* spare);

  // Writes `factor` times the gradient of the loss with respect to pred into `out`, in pred's dtype. `spare`: twice the
  // count.
  void (*gradient)(const Compared& rows, Loss loss, float beta, float factor, float* spare, void* out);
};

FASTSSL_TABLE(PatchTiles, patch_tiles)

}  // namespace fastssl
