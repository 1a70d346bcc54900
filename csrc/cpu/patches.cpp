// Patches of images on the CPU: losses where they are masked (MAE, arXiv:2111.06377; VideoMAE, arXiv:2203.12602;
// data2vec, arXiv:2202.03555; EVA, arXiv:2211.07636), and copies of those that are visible.
//
//     masked_patch_loss     loss[b, l] = |pred[b, l] - y|^2 / P,    y = patch l of image b, normalised, channels last
//     masked_feature_loss   loss[b, l] = smooth L1, 1 - cosine, or mean square of pred[b, l] and target[b, l]
//     gather_patches        out[b, k] = patch ids[b, k] of image b, channels first
//     scatter_patches       the transpose: images made of patches, which are added where several go to the same place
//
// Algorithm. A thread takes masked patches one after the other. It reads a patch's elements as float32, from images of
// any strides and dtype, takes their mean and deviation, interleaves the channels as in the prediction, and compares
// the prediction's row with the result. Meanwhile it prefetches the next patch and its prediction, whose addresses the
// hardware could not guess. The backward pass does all that again, and writes the gradient.
//
// Cost. Of P B L elements with a share m masked, each pass reads 2 m P B L and the backward pass writes P B L; nothing
// is kept between the passes.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "common/pages.h"
#include "common/places.h"
#include "common/portable.h"
#include "common/token_rows.h"
#include "patches_tiles.h"

namespace fastssl {
namespace {

constexpr int64_t kGrain = 1 << 15;  // fewer elements are not worth another thread

int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1)); }

// How images (B, C, [T,] H, W) are cut into patches of sizes `patch`.
struct Cutting {
  PatchShape shape;
  int64_t sample;               // elements from one image to the next
  std::array<int64_t, 3> grid;  // patches along time, height and width
  std::array<int64_t, 3> step;  // elements from one patch to the next, along each

  Cutting(at::IntArrayRef sizes, at::IntArrayRef strides, at::IntArrayRef patch) {
    TORCH_CHECK_VALUE((patch.size() == 2 || patch.size() == 3) && sizes.size() == patch.size() + 2,
                      "images must have shape (B, C, H, W) with patches [p, q], or (B, C, T, H, W) with [t, p, q], got ",
                      sizes, " and ", patch);
    std::array<int64_t, 3> size{1, 1, 1}, stride{}, cut{1, 1, 1};
    const size_t first = 3 - patch.size();
    for (size_t i = 0; i < patch.size(); ++i) {
      TORCH_CHECK_VALUE(patch[i] > 0 && sizes[i + 2] % patch[i] == 0, "sizes of images must be multiples of ", patch,
                        ", a patch's, got ", sizes.slice(2));
      size[first + i] = sizes[i + 2];
      stride[first + i] = strides[i + 2];
      cut[first + i] = patch[i];
    }
    shape = {sizes[1], cut[0], cut[1], cut[2], strides[1], stride[0], stride[1], stride[2]};
    sample = strides[0];
    for (int i = 0; i < 3; ++i) {
      grid[i] = size[i] / cut[i];
      step[i] = stride[i] * cut[i];
    }
  }

  Cutting(const Tensor& images, at::IntArrayRef patch) : Cutting(images.sizes(), images.strides(), patch) {}

  int64_t length() const { return grid[0] * grid[1] * grid[2]; }

  // Where patch l of image b begins.
  int64_t offset(int64_t b, int64_t l) const {
    const int64_t row = l / grid[2], frame = row / grid[1];
    return b * sample + frame * step[0] + row % grid[1] * step[1] + l % grid[2] * step[2];
  }

  // Calls visit(offset) for each run of `shape.columns` elements, channels first, in a patch that begins at `start`.
  template <typename Visit>
  void each_row(int64_t start, const Visit& visit) const {
    for (int64_t c = 0; c < shape.channels; ++c)
      for (int64_t t = 0; t < shape.frames; ++t)
        for (int64_t p = 0; p < shape.rows; ++p) visit(start + c * shape.channel + t * shape.frame + p * shape.row);
  }
};

void check_element(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on the CPU, as pred is, got ", x.device());
  TORCH_CHECK_VALUE(has_element(x) || x.scalar_type() == at::kDouble, name,
                    " must be floating-point, of 16, 32 or 64 bits, got ", x.scalar_type());
}

// The checks that both losses make of their arguments.
void check_rows(const Tensor& pred, const char* name, const Tensor& target, const Tensor& mask) {
  check_element("pred", pred);
  check_element(name, target);
  TORCH_CHECK_VALUE(pred.dim() == 3, "pred must have shape (B, L, D), got ", pred.sizes());
  TORCH_CHECK_VALUE(mask.device().is_cpu() && mask.scalar_type() == at::kBool, "mask must be boolean, got ",
                    mask.scalar_type(), " on ", mask.device());
  TORCH_CHECK_VALUE(mask.sizes() == pred.sizes().slice(0, 2), "mask must have shape ", pred.sizes().slice(0, 2),
                    ", got ", mask.sizes());
}

void check_grad(const Tensor& grad_losses, const Tensor& mask) {
  TORCH_CHECK_VALUE(grad_losses.device().is_cpu() && grad_losses.sizes() == mask.sizes(),
                    "grad_losses must have mask's shape, got ", grad_losses.sizes(), " and ", mask.sizes());
}

// Calls visit(i, next) for each masked i in [first, last), where `next` is the next masked one, or i for the last.
template <typename Visit>
void each_masked(const bool* masked, int64_t first, int64_t last, const Visit& visit) {
  const auto from = [=](int64_t i) { return std::find(masked + i, masked + last, true) - masked; };
  for (int64_t i = from(first), next; i < last; i = next) {
    next = from(i + 1);
    visit(i, next < last ? next : i);
  }
}

// A `source` gives the rows to compare: source.rows(i, next, spare) those of row i, where `spare` has room for two
// rows, and row `next` is prefetched meanwhile.

// The losses (B, L).
template <typename Source>
Tensor losses(const Tensor& pred, const Tensor& mask_, Loss loss, float beta, const Source& source) {
  const Tensor mask = mask_.contiguous(), out = at::empty(mask.sizes(), pred.options().dtype(at::kFloat));
  const PatchTiles& tile = FASTSSL_TABLE_IN_USE(patch_tiles);
  const int64_t count = pred.size(2);
  const bool* const masked = mask.const_data_ptr<bool>();
  float* const to = out.mutable_data_ptr<float>();
  at::parallel_for(0, mask.numel(), grain_of(count), [&](int64_t first, int64_t last) {
    std::fill(to + first, to + last, 0.f);
    std::vector<float> spare(2 * count), target(2 * count);
    each_masked(masked, first, last, [&](int64_t i, int64_t next) {
      to[i] = tile.loss(source.rows(i, next, target.data()), loss, beta, spare.data());
    });
  });
  return out;
}

template <typename Source>
Tensor losses_backward(const Tensor& grad_, const Tensor& pred, const Tensor& mask_, Loss loss, float beta,
                       const Source& source) {
  const Tensor mask = mask_.contiguous(), grad = grad_.to(at::kFloat).contiguous();
  const Tensor grad_pred = empty_in_large_pages(pred.sizes(), pred.options());
  const PatchTiles& tile = FASTSSL_TABLE_IN_USE(patch_tiles);
  const int64_t count = pred.size(2), bytes = count * pred.element_size();
  const bool* const masked = mask.const_data_ptr<bool>();
  const float* const factor = grad.const_data_ptr<float>();
  char* const to = static_cast<char*>(grad_pred.mutable_data_ptr());
  at::parallel_for(0, mask.numel(), grain_of(count), [&](int64_t first, int64_t last) {
    std::vector<float> spare(2 * count), target(2 * count);
    int64_t written = first;
    each_masked(masked, first, last, [&](int64_t i, int64_t next) {
      std::memset(to + written * bytes, 0, (i - written) * bytes);
      tile.gradient(source.rows(i, next, target.data()), loss, beta, factor[i], spare.data(), to + i * bytes);
      written = i + 1;
    });
    std::memset(to + written * bytes, 0, (last - written) * bytes);
  });
  return grad_pred;
}

Norm norm_of(c10::string_view name) {
  TORCH_CHECK_VALUE(name == "none" || name == "patch" || name == "channel",
                    "norm must be 'none', 'patch' or 'channel', got '", name, "'");
  return name == "none" ? Norm::None : name == "patch" ? Norm::Patch : Norm::Channel;
}

// Source: predictions, and the patches that they are compared with.
struct MaskedPatches {
  TokenRows pred;
  const char* images;
  Element element;
  Cutting cutting;
  Norm norm;
  const PatchTiles& tile;

  MaskedPatches(const Tensor& pred_, const Tensor& images_, at::IntArrayRef patch, c10::string_view norm)
      : pred(pred_),
        images(static_cast<const char*>(images_.const_data_ptr())),
        element(element_of(images_)),
        cutting(images_, patch),
        norm(norm_of(norm)),
        tile(FASTSSL_TABLE_IN_USE(patch_tiles)) {
    TORCH_CHECK_VALUE(pred_.size(0) == images_.size(0) && pred_.size(1) == cutting.length() &&
                          pred_.size(2) == cutting.shape.elements(),
                      "pred must have a row for each patch of images, (", images_.size(0), ", ", cutting.length(),
                      ", ", cutting.shape.elements(), "), got ", pred_.sizes());
  }

  const char* patch(int64_t i) const {
    return images + cutting.offset(i / pred.length, i % pred.length) * bytes_of(element);
  }

  Compared rows(int64_t i, int64_t next, float* spare) const {
    const float* const target = tile.target(patch(i), element, cutting.shape, norm, patch(next), spare);
    return {pred[i], pred.element, target, Element::Float32, cutting.shape.elements(), pred[next]};
  }
};

Tensor masked_patch_loss(const Tensor& pred, const Tensor& images, const Tensor& mask, at::IntArrayRef patch,
                         c10::string_view norm) {
  check_rows(pred, "images", images, mask);
  return losses(pred, mask, Loss::MeanSquare, 0, MaskedPatches(pred, images, patch, norm));
}

Tensor masked_patch_loss_backward(const Tensor& grad_losses, const Tensor& pred, const Tensor& images,
                                  const Tensor& mask, at::IntArrayRef patch, c10::string_view norm) {
  check_rows(pred, "images", images, mask);
  check_grad(grad_losses, mask);
  return losses_backward(grad_losses, pred, mask, Loss::MeanSquare, 0, MaskedPatches(pred, images, patch, norm));
}

Loss loss_of(c10::string_view name) {
  TORCH_CHECK_VALUE(name == "smooth_l1" || name == "cosine" || name == "mse",
                    "loss must be 'smooth_l1', 'cosine' or 'mse', got '", name, "'");
  return name == "smooth_l1" ? Loss::SmoothL1 : name == "cosine" ? Loss::Cosine : Loss::MeanSquare;
}

// Source: predictions, and the features that they are compared with.
struct MaskedFeatures {
  TokenRows pred, target;

  MaskedFeatures(const Tensor& pred_, const Tensor& target_) : pred(pred_), target(target_) {
    TORCH_CHECK_VALUE(pred_.sizes() == target_.sizes(), "pred and target must have the same shape, got ", pred_.sizes(),
                      " and ", target_.sizes());
  }

  Compared rows(int64_t i, int64_t next, float*) const {
    return {pred[i], pred.element, target[i], target.element, pred.dim, pred[next]};
  }
};

Tensor masked_feature_loss(const Tensor& pred, const Tensor& target, const Tensor& mask, c10::string_view kind,
                           double beta) {
  check_rows(pred, "target", target, mask);
  return losses(pred, mask, loss_of(kind), static_cast<float>(beta), MaskedFeatures(pred, target));
}

Tensor masked_feature_loss_backward(const Tensor& grad_losses, const Tensor& pred, const Tensor& target,
                                    const Tensor& mask, c10::string_view kind, double beta) {
  check_rows(pred, "target", target, mask);
  check_grad(grad_losses, mask);
  return losses_backward(grad_losses, pred, mask, loss_of(kind), static_cast<float>(beta), MaskedFeatures(pred, target));
}

void check_patch_ids(const Tensor& ids, int64_t batch) {
  TORCH_CHECK_VALUE(ids.device().is_cpu() && ids.dim() == 2 && ids.size(0) == batch, "ids must have shape (", batch,
                    ", K), a row for each image, got ", ids.sizes());
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, "ids must be int64 or int32, got ",
                    ids.scalar_type());
}

Tensor gather_patches(const Tensor& images, const Tensor& ids_, at::IntArrayRef patch) {
  const Cutting cutting(images, patch);
  check_patch_ids(ids_, images.size(0));
  const Tensor ids = checked_ids("ids_keep", ids_, cutting.length());
  const int64_t count = ids.size(1), elements = cutting.shape.elements(), columns = cutting.shape.columns;
  const Tensor out = empty_in_large_pages({images.size(0), count, elements}, images.options());
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), "gather_patches", [&] {
    const scalar_t* const from = images.const_data_ptr<scalar_t>();
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, ids.numel(), grain_of(elements), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        scalar_t* row = to + i * elements;
        cutting.each_row(cutting.offset(i / count, id[i]), [&](int64_t offset) {
          const int64_t stride = cutting.shape.column;
          if (stride == 1) {
            std::memcpy(row, from + offset, columns * sizeof(scalar_t));
          } else {
            for (int64_t q = 0; q < columns; ++q) row[q] = from[offset + q * stride];
          }
          row += columns;
        });
      }
    });
  });
  return out;
}

Tensor scatter_patches(const Tensor& patches_, const Tensor& ids_, at::IntArrayRef size, at::IntArrayRef patch) {
  TORCH_CHECK_VALUE(std::all_of(size.begin(), size.end(), [](int64_t n) { return n >= 0; }),
                    "size must not be negative, got ", size);
  const Tensor images = empty_in_large_pages(size, patches_.options());
  const Cutting cutting(images, patch);
  check_patch_ids(ids_, images.size(0));
  const Tensor ids = checked_ids("ids_keep", ids_, cutting.length());
  const int64_t count = ids.size(1), length = cutting.length(), elements = cutting.shape.elements();
  TORCH_CHECK_VALUE(patches_.dim() == 3 && patches_.size(0) == images.size(0) && patches_.size(1) == count &&
                        patches_.size(2) == elements,
                    "patches must have shape (", images.size(0), ", ", count, ", ", elements, "), got ",
                    patches_.sizes());
  const Tensor patches = with_unit_stride(patches_);
  const int64_t sample = patches.stride(0), stride = patches.stride(1);
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, patches.scalar_type(), "scatter_patches", [&] {
    const scalar_t* const from = patches.const_data_ptr<scalar_t>();
    scalar_t* const to = images.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, images.size(0), grain_of(length * elements), [&](int64_t first, int64_t last) {
      Places places(length, count);
      std::vector<at::opmath_type<scalar_t>> sums(elements);
      std::vector<scalar_t> summed(elements);
      const std::vector<scalar_t> zeros(elements);
      for (int64_t b = first; b < last; ++b) {
        places.fill(id + b * count);
        for (int64_t l = 0; l < length; ++l) {
          const int64_t k = places.head[l];
          const scalar_t* row = k < 0 ? zeros.data() : from + b * sample + k * stride;
          if (k >= 0 && places.next[k] >= 0) {
            std::fill(sums.begin(), sums.end(), 0);
            for (int64_t i = k; i >= 0; i = places.next[i])
              for (int64_t e = 0; e < elements; ++e) sums[e] += from[b * sample + i * stride + e];
            std::copy(sums.begin(), sums.end(), summed.begin());
            row = summed.data();
          }
          cutting.each_row(cutting.offset(b, l), [&](int64_t offset) {
            std::copy_n(row, cutting.shape.columns, to + offset);
            row += cutting.shape.columns;
          });
        }
      }
    });
  });
  return images;
}

FASTSSL_KERNELS(CPU, m) {
  implement<&masked_patch_loss, 2>(m, "masked_patch_loss");
  implement<&masked_patch_loss_backward, 3>(m, "masked_patch_loss_backward");
  implement<&masked_feature_loss, 2>(m, "masked_feature_loss");
  implement<&masked_feature_loss_backward, 3>(m, "masked_feature_loss_backward");
  m.impl("gather_patches", &gather_patches);
  m.impl("scatter_patches", &scatter_patches);
}

}  // namespace
}  // namespace fastssl
