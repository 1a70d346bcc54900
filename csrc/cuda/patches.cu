// Patches of images on the GPU: losses where they are masked (MAE, arXiv:2111.06377; VideoMAE, arXiv:2203.12602;
// data2vec, arXiv:2202.03555; EVA, arXiv:2211.07636), and copies of those that are visible.
//
//     masked_patch_loss     loss[b, l] = |pred[b, l] - y|^2 / P,    y = patch l of image b, normalised, channels last
//     masked_feature_loss   loss[b, l] = smooth L1, 1 - cosine, or mean square of pred[b, l] and target[b, l]
//     gather_patches        out[b, k] = patch ids[b, k] of image b, channels first
//     scatter_patches       the transpose: images made of patches, which are added where several go to the same place
//
// Algorithm. A warp takes one patch. Its lanes take neighbouring elements, read in place from images of any strides,
// and exchange their sums in a fixed order, in float32 (float64 where an input is): the same bits in every run, no
// shared memory. The mean is taken first and then the deviation, as in the formula; a patch is read from memory once,
// and from the cache in later passes. gather_patches moves 16 bytes per lane where rows of patches are aligned to that.
// In scatter_patches every place looks through the K ids of its sample, so each element is written once and nothing is
// zeroed first.
//
// Cost. With a share m of P B L elements masked, each pass reads 2 m P B L, and the backward pass writes P B L.
//
// An id out of range stops the process with an assertion: reporting it in another way would make the CPU wait.
#include <cassert>
#include <optional>
#include <string>
#include <vector>

#include "common/elements.h"
#include "common/launch.h"

namespace fastssl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMost = 1 << 30;  // elements of a patch, and patches of an image: they are counted with 32 bits

enum class Norm { None, Patch, Channel };
enum class Loss { MeanSquare, SmoothL1, Cosine };

// How images (B, C, [T,] H, W) are cut into patches, of `elements` elements in the order (c, t, p, q).
struct Cutting {
  unsigned channels, pixels, elements;
  Divisor by_pixels, by_frames, by_rows, by_columns;  // division by the sizes of a patch
  Divisor by_grid_rows, by_grid_columns;              // division by the sizes of the grid of patches
  int64_t length;                                     // patches of an image
  int64_t sample, step[3];                            // strides between images, and between patches
  int64_t channel, frame, row, column;                // strides within a patch

  // Where patch l of image b begins.
  __device__ int64_t offset(int64_t b, unsigned l) const {
    const unsigned row_of_grid = by_grid_columns.quotient(l), t = by_grid_rows.quotient(row_of_grid);
    const unsigned w = l - row_of_grid * by_grid_columns.divisor, h = row_of_grid - t * by_grid_rows.divisor;
    return b * sample + t * step[0] + h * step[1] + w * step[2];
  }

  // The offset of element e from the beginning of its patch.
  __device__ int64_t within(unsigned e) const {
    const unsigned line = by_columns.quotient(e), plane = by_rows.quotient(line);
    const unsigned c = by_frames.quotient(plane), t = plane - c * by_frames.divisor;
    return c * channel + t * frame + (line - plane * by_rows.divisor) * row + (e - line * by_columns.divisor) * column;
  }
};

// The patches that predictions are compared with. Elements are normalised in groups: those of a channel, or all.
template <typename T>
struct Patches {
  Elements<T> images;
  Cutting cutting;
  Norm norm;
  unsigned groups, group;  // their number, and their elements

  struct Prepared {
    int64_t start;
    T mean, scale;
  };

  __device__ Prepared prepare(int64_t b, unsigned l, unsigned g) const {
    Prepared y{cutting.offset(b, l), 0, 1};
    if (norm == Norm::None) return y;
    T sum = 0, squares = 0;
    for (unsigned e = threadIdx.x; e < group; e += 32) sum += images[y.start + cutting.within(g * group + e)];
    y.mean = warp_sum(sum) / group;
    for (unsigned e = threadIdx.x; e < group; e += 32) {
      const T apart = images[y.start + cutting.within(g * group + e)] - y.mean;
      squares += apart * apart;
    }
    const T var = warp_sum(squares) / (group - 1);
    y.scale = 1 / (norm == Norm::Patch ? sqrt(var + T(1e-6)) : sqrt(var) + T(1e-6));
    return y;
  }

  __device__ T value(const Prepared& y, unsigned e) const {
    return (images[y.start + cutting.within(e)] - y.mean) * y.scale;
  }

  // The place of element e in a prediction, whose channels are last.
  __device__ unsigned place(unsigned e) const {
    const unsigned c = cutting.by_pixels.quotient(e);
    return (e - c * cutting.pixels) * cutting.channels + c;
  }
};

// Rows (B, L, D) with unit stride within each.
template <typename T>
struct Rows {
  Elements<T> elements;
  int64_t sample, row;
  unsigned groups, group;

  __device__ int64_t prepare(int64_t b, unsigned l, unsigned) const { return b * sample + l * row; }
  __device__ T value(int64_t start, unsigned e) const { return elements[start + e]; }
  __device__ unsigned place(unsigned e) const { return e; }
};

template <typename T>
__device__ T magnitude(T x) {
  return x < 0 ? -x : x;
}

// What cosine losses need: 1 / |x| and 1 / |y| (where lengths are at least 1e-12), the cosine, and whether |x| is above
// 1e-12.
template <typename T>
struct Angle {
  T x, y, cosine;
  bool above;

  __device__ Angle(T xx, T yy, T xy) {
    const T least = T(1e-12), length_x = sqrt(xx), length_y = sqrt(yy);
    above = !(length_x < least);
    x = 1 / (length_x < least ? least : length_x);
    y = 1 / (length_y < least ? least : length_y);
    cosine = xy * x * y;
  }
};

// Sums over a row: of the terms of the loss, or of x x, y y and x y.
template <typename T, typename Target>
__device__ void sum_up(const Rows<T>& pred, const Target& target, int64_t b, unsigned l, Loss loss, T beta, T* sums) {
  const int64_t x_start = pred.prepare(b, l, 0);
  for (unsigned g = 0; g < target.groups; ++g) {
    const auto prepared = target.prepare(b, l, g);
    const unsigned end = (g + 1) * target.group;
    for (unsigned e = g * target.group + threadIdx.x; e < end;) {  // sums of up to 32 terms, then sums of those sums
      T terms[3] = {};
      for (const unsigned stop = min(end - e, 1024u) + e; e < stop; e += 32) {
        const T x = pred.value(x_start, target.place(e)), y = target.value(prepared, e);
        const T apart = magnitude(x - y);
        if (loss == Loss::Cosine) {
          terms[0] += x * x;
          terms[1] += y * y;
          terms[2] += x * y;
        } else {
          terms[0] += loss == Loss::MeanSquare ? apart * apart
                      : apart < beta           ? apart * apart * (T(0.5) / beta)
                                               : apart - T(0.5) * beta;
        }
      }
      for (int i = 0; i < 3; ++i) sums[i] += terms[i];
    }
  }
  for (int i = 0; i < (loss == Loss::Cosine ? 3 : 1); ++i) sums[i] = warp_sum(sums[i]);
}

// Blocks: kWarps rows.
template <typename T, typename Target>
__global__ void __launch_bounds__(kThreads, 4)
    losses(const __grid_constant__ Rows<T> pred, const __grid_constant__ Target target, const bool* mask, int64_t rows,
           int64_t length, Loss loss, T beta, T* out) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (i >= rows) return;
  T result = 0;
  if (mask[i]) {
    T sums[3] = {};
    sum_up(pred, target, i / length, static_cast<unsigned>(i % length), loss, beta, sums);
    result = loss == Loss::Cosine ? 1 - Angle<T>(sums[0], sums[1], sums[2]).cosine : sums[0] / pred.group;
  }
  if (threadIdx.x == 0) out[i] = result;
}

// Blocks: kWarps rows.
template <typename scalar_t, typename T, typename Target>
__global__ void __launch_bounds__(kThreads, 4)
    gradients(const T* grad, const __grid_constant__ Rows<T> pred, const __grid_constant__ Target target,
              const bool* mask, int64_t rows, int64_t length, Loss loss, T beta, scalar_t* grad_pred) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (i >= rows) return;
  scalar_t* const to = grad_pred + i * pred.group;
  if (!mask[i]) {
    for (unsigned e = threadIdx.x; e < pred.group; e += 32) to[e] = scalar_t(T(0));
    return;
  }
  const int64_t b = i / length, x_start = pred.prepare(b, static_cast<unsigned>(i % length), 0);
  const unsigned l = static_cast<unsigned>(i % length);
  const T factor = grad[i], share = factor / pred.group;
  T along = 0, away = 0;
  if (loss == Loss::Cosine) {
    T sums[3] = {};
    sum_up(pred, target, b, l, loss, beta, sums);
    const Angle<T> angle(sums[0], sums[1], sums[2]);
    along = angle.above ? factor * angle.cosine * angle.x * angle.x : 0;
    away = factor * angle.x * angle.y;
  }
  for (unsigned g = 0; g < target.groups; ++g) {
    const auto prepared = target.prepare(b, l, g);
    for (unsigned e = g * target.group + threadIdx.x; e < (g + 1) * target.group; e += 32) {
      const unsigned place = target.place(e);
      const T x = pred.value(x_start, place), y = target.value(prepared, e), apart = x - y;
      const T sign = apart > 0 ? T(1) : apart < 0 ? T(-1) : apart;
      to[place] = static_cast<scalar_t>(loss == Loss::Cosine            ? along * x - away * y
                                        : loss == Loss::MeanSquare      ? 2 * share * apart
                                        : magnitude(apart) < beta       ? share * (apart / beta)
                                                                        : share * sign);
    }
  }
}

// Sizes and strides are in words. Blocks: kWarps of the K x B patches.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4)
    gather_words(const Word* __restrict__ images, const __grid_constant__ Cutting cutting, Ids ids, int64_t count,
                 int64_t patches, Word* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (i >= patches) return;
  const int64_t id = ids[i];
  const bool id_is_in_range = id >= 0 && id < cutting.length;
  if (id_is_in_range) {
    const Word* const from = images + cutting.offset(i / count, static_cast<unsigned>(id));
#pragma unroll 4
    for (unsigned e = threadIdx.x; e < cutting.elements; e += 32) out[i * cutting.elements + e] = from[cutting.within(e)];
  }
  assert(id_is_in_range);
}

// Blocks: kWarps of the L x B places.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_elements(const scalar_t* __restrict__ patches, const __grid_constant__ Cutting cutting, Ids ids,
                     int64_t count, int64_t places, scalar_t* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (i >= places) return;
  const int64_t b = i / cutting.length, l = i % cutting.length;
  int64_t first = -1, last = -1;
  bool ids_are_in_range = true;
  for (int64_t start = 0; start < count; start += 32) {
    const int64_t k = start + threadIdx.x, id = k < count ? ids[b * count + k] : l;
    ids_are_in_range &= id >= 0 && id < cutting.length;
    const unsigned here = __ballot_sync(0xffffffff, k < count && id == l);
    if (!here) continue;
    if (first < 0) first = start + __ffs(here) - 1;
    last = start + 31 - __clz(here);
  }
  scalar_t* const to = out + cutting.offset(b, static_cast<unsigned>(l));
  for (unsigned e = threadIdx.x; e < cutting.elements; e += 32) {
    const scalar_t* const from = patches + b * count * cutting.elements + e;
    if (first >= 0 && first == last) {
      to[cutting.within(e)] = from[first * cutting.elements];
      continue;
    }
    Wide<scalar_t> sum = 0;
    for (int64_t k = first; k >= 0 && k <= last; ++k)
      if (ids[b * count + k] == l) sum += static_cast<Wide<scalar_t>>(from[k * cutting.elements]);
    to[cutting.within(e)] = static_cast<scalar_t>(sum);
  }
  assert(ids_are_in_range);
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// A Cutting whose sizes and strides are in words of `word` elements.
Cutting cutting_of(Sizes sizes, Sizes strides, const std::vector<int64_t>& patch, int64_t word) {
  if ((patch.size() != 2 && patch.size() != 3) || sizes.size() != patch.size() + 2)
    refuse("images must have shape (B, C, H, W) with patches [p, q], or (B, C, T, H, W) with [t, p, q], got ",
           text(sizes), " and ", text(patch));
  int64_t grid[3] = {1, 1, 1}, cut[3] = {1, 1, 1}, stride[3] = {};
  const size_t first = 3 - patch.size();
  for (size_t i = 0; i < patch.size(); ++i) {
    if (patch[i] <= 0 || sizes[i + 2] % patch[i] != 0)
      refuse("sizes of images must be multiples of ", text(patch), ", a patch's, got ", text(sizes));
    grid[first + i] = sizes[i + 2] / patch[i];
    cut[first + i] = patch[i];
    stride[first + i] = strides[i + 2];
  }
  const int64_t pixels = cut[0] * cut[1] * cut[2], length = grid[0] * grid[1] * grid[2];
  if (pixels * sizes[1] > kMost || length > kMost)
    refuse("patches must have at most 2^30 elements, and images as many patches, got ", text(sizes));
  Cutting cutting{};
  cutting.channels = static_cast<unsigned>(sizes[1]);
  cutting.pixels = static_cast<unsigned>(pixels / word);
  cutting.elements = cutting.channels * cutting.pixels;
  cutting.by_pixels = Divisor(cutting.pixels);
  cutting.by_frames = Divisor(static_cast<unsigned>(cut[0]));
  cutting.by_rows = Divisor(static_cast<unsigned>(cut[1]));
  cutting.by_columns = Divisor(static_cast<unsigned>(cut[2] / word));
  cutting.by_grid_rows = Divisor(static_cast<unsigned>(std::max<int64_t>(grid[1], 1)));
  cutting.by_grid_columns = Divisor(static_cast<unsigned>(std::max<int64_t>(grid[2], 1)));
  cutting.sample = strides[0] / word;
  for (int i = 0; i < 3; ++i) cutting.step[i] = stride[i] * cut[i] / word;
  cutting.channel = strides[1] / word;
  cutting.frame = stride[0] / word;
  cutting.row = stride[1] / word;
  cutting.column = word > 1 ? 1 : stride[2];
  cutting.length = length;
  return cutting;
}

Element checked_element(const char* name, const Tensor& x) {
  const std::optional<Element> element = element_of(x);
  if (!element) refuse(name, " must be floating-point, of 16, 32 or 64 bits, got ", x.scalar_type());
  return *element;
}

// The checks that both losses make of their arguments.
void check_rows(const Tensor& pred, const char* name, const Tensor& target, const Tensor& mask) {
  checked_element("pred", pred);
  checked_element(name, target);
  if (pred.dim() != 3 || pred.size(2) > kMost || pred.size(1) > kMost)
    refuse("pred must have shape (B, L, D), got ", text(pred.sizes()));
  check_device(name, target, pred);
  check_device("mask", mask, pred);
  if (mask.scalar_type() != ScalarType::Bool || mask.dim() != 2 || mask.size(0) != pred.size(0) ||
      mask.size(1) != pred.size(1))
    refuse("mask must be boolean, of pred's first two sizes, got ", mask.scalar_type(), " of shape ",
           text(mask.sizes()), " and ", text(pred.sizes()));
}

Tensor with_unit_stride(const Tensor& x) { return x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

template <typename T>
Rows<T> rows_of(const Tensor& x) {
  return {{x.const_data_ptr(), *element_of(x)}, x.stride(0), x.stride(1), 1, static_cast<unsigned>(x.size(2))};
}

// Calls visit(Type<T>()), where T, the type of sums, is double if x or y is float64, else float.
template <typename Visit>
void with_sums(const Tensor& x, const Tensor& y, const Visit& visit) {
  if (x.scalar_type() == ScalarType::Double || y.scalar_type() == ScalarType::Double)
    visit(Type<double>());
  else
    visit(Type<float>());
}

// The losses or, where `grad` is given, grad_pred. make_target(Type<T>()) makes what predictions are compared with.
template <typename MakeTarget>
Tensor launch_losses(const Tensor* grad_, const Tensor& pred_, const Tensor& other, const Tensor& mask_, Loss loss,
                     double beta, const MakeTarget& make_target) {
  const Tensor pred = with_unit_stride(pred_), mask = torch::stable::contiguous(mask_);
  const int64_t rows = mask.numel(), length = mask.size(1);
  const ScalarType sum = wide(other.scalar_type()) == ScalarType::Double ? ScalarType::Double : wide(pred.scalar_type());
  if (grad_ && (grad_->dim() != 2 || !same(grad_->sizes(), mask.sizes())))
    refuse("grad_losses must have mask's shape, got ", text(grad_->sizes()), " and ", text(mask.sizes()));
  if (grad_) check_device("grad_losses", *grad_, pred);
  const Tensor out = grad_ ? torch::stable::new_empty(pred, pred.sizes()) : torch::stable::new_empty(pred, mask.sizes(), sum);
  const Launch launch(pred);
  const dim3 blocks(static_cast<unsigned>(ceil_div(rows, kWarps))), threads(32, kWarps);
  with_sums(pred, other, [&]<typename T>(Type<T> type) {
    const auto target = make_target(type);
    using Target = std::remove_const_t<decltype(target)>;
    if (!grad_) {
      launch(losses<T, Target>, blocks, threads, rows_of<T>(pred), target, mask.const_data_ptr<bool>(), rows, length,
             loss, static_cast<T>(beta), written<T>(out));
      return;
    }
    const Tensor grad = torch::stable::contiguous(to_dtype(*grad_, sum));
    with_float(pred.scalar_type(), "pred", [&]<typename scalar_t>(Type<scalar_t>) {
      if constexpr (!std::is_same_v<scalar_t, double> || std::is_same_v<T, double>)
        launch(gradients<scalar_t, T, Target>, blocks, threads, read<T>(grad), rows_of<T>(pred), target,
               mask.const_data_ptr<bool>(), rows, length, loss, static_cast<T>(beta), written<scalar_t>(out));
    });
  });
  return out;
}

Tensor patch_losses(const Tensor* grad, const Tensor& pred, const Tensor& images, const Tensor& mask,
                    const std::vector<int64_t>& patch, const std::string& norm_) {
  check_rows(pred, "images", images, mask);
  if (norm_ != "none" && norm_ != "patch" && norm_ != "channel")
    refuse("norm must be 'none', 'patch' or 'channel', got '", norm_, "'");
  const Norm norm = norm_ == "none" ? Norm::None : norm_ == "patch" ? Norm::Patch : Norm::Channel;
  const Cutting cutting = cutting_of(images.sizes(), images.strides(), patch, 1);
  if (pred.size(0) != images.size(0) || pred.size(1) != cutting.length || pred.size(2) != cutting.elements)
    refuse("pred must have a row for each patch of images, [", images.size(0), ", ", cutting.length, ", ",
           cutting.elements, "], got ", text(pred.sizes()));
  return launch_losses(grad, pred, images, mask, Loss::MeanSquare, 0, [&]<typename T>(Type<T>) {
    const bool by_channel = norm == Norm::Channel;
    return Patches<T>{{images.const_data_ptr(), *element_of(images)}, cutting, norm, by_channel ? cutting.channels : 1,
                      by_channel ? cutting.pixels : cutting.elements};
  });
}

Tensor feature_losses(const Tensor* grad, const Tensor& pred, const Tensor& target_, const Tensor& mask,
                      const std::string& loss, double beta) {
  check_rows(pred, "target", target_, mask);
  if (loss != "smooth_l1" && loss != "cosine" && loss != "mse")
    refuse("loss must be 'smooth_l1', 'cosine' or 'mse', got '", loss, "'");
  if (!same(pred.sizes(), target_.sizes()))
    refuse("pred and target must have the same shape, got ", text(pred.sizes()), " and ", text(target_.sizes()));
  const Tensor target = with_unit_stride(target_);
  const Loss kind = loss == "smooth_l1" ? Loss::SmoothL1 : loss == "cosine" ? Loss::Cosine : Loss::MeanSquare;
  return launch_losses(grad, pred, target, mask, kind, beta,
                       [&]<typename T>(Type<T>) { return rows_of<T>(target); });
}

Tensor masked_patch_loss(const Tensor& pred, const Tensor& images, const Tensor& mask,
                         const std::vector<int64_t>& patch, const std::string& norm) {
  return patch_losses(nullptr, pred, images, mask, patch, norm);
}

Tensor masked_patch_loss_backward(const Tensor& grad_losses, const Tensor& pred, const Tensor& images,
                                  const Tensor& mask, const std::vector<int64_t>& patch, const std::string& norm) {
  return patch_losses(&grad_losses, pred, images, mask, patch, norm);
}

Tensor masked_feature_loss(const Tensor& pred, const Tensor& target, const Tensor& mask, const std::string& kind,
                           const Tensor& beta) {
  return feature_losses(nullptr, pred, target, mask, kind, number_in(beta));
}

Tensor masked_feature_loss_backward(const Tensor& grad_losses, const Tensor& pred, const Tensor& target,
                                    const Tensor& mask, const std::string& kind, const Tensor& beta) {
  return feature_losses(&grad_losses, pred, target, mask, kind, number_in(beta));
}

Tensor checked_ids(const Tensor& ids, int64_t batch, const Tensor& x) {
  if (ids.dim() != 2 || ids.size(0) != batch)
    refuse("ids must have shape (", batch, ", K), a row for each image, got ", text(ids.sizes()));
  if (ids.scalar_type() != ScalarType::Long && ids.scalar_type() != ScalarType::Int)
    refuse("ids must be int64 or int32, got ", ids.scalar_type());
  check_device("ids", ids, x);
  return torch::stable::contiguous(ids);
}

Tensor gather_patches(const Tensor& images, const Tensor& ids_, const std::vector<int64_t>& patch) {
  const Cutting cutting = cutting_of(images.sizes(), images.strides(), patch, 1);
  const Tensor ids = checked_ids(ids_, images.size(0), images);
  const int64_t count = ids.size(1), size = images.element_size(), dims = images.dim();
  const Tensor out = torch::stable::new_empty(images, {images.size(0), count, cutting.elements});
  int64_t together = address(images) | address(out) | patch.back() * size;
  for (int64_t d = 0; d < dims - 1; ++d) together |= images.stride(d) * size;
  const auto launch = [&]<typename Word>(Type<Word>) {
    Launch{images}(gather_words<Word>, static_cast<unsigned>(ceil_div(ids.numel(), kWarps)), dim3(32, kWarps),
                   read<Word>(images), cutting_of(images.sizes(), images.strides(), patch, sizeof(Word) / size),
                   ids_of(ids), count, ids.numel(), written<Word>(out));
  };
  if (images.stride(dims - 1) == 1 && common_alignment(together) == 16)
    launch(Type<uint4>());
  else
    with_float(images.scalar_type(), "images", launch);
  return out;
}

Tensor scatter_patches(const Tensor& patches_, const Tensor& ids_, const std::vector<int64_t>& size,
                       const std::vector<int64_t>& patch) {
  if (std::any_of(size.begin(), size.end(), [](int64_t n) { return n < 0; }))
    refuse("size must not be negative, got ", text(size));
  const Tensor patches = torch::stable::contiguous(patches_), images = torch::stable::new_empty(patches, size);
  const Cutting cutting = cutting_of(images.sizes(), images.strides(), patch, 1);
  const Tensor ids = checked_ids(ids_, images.size(0), patches);
  const int64_t count = ids.size(1), places = images.size(0) * cutting.length;
  if (patches.dim() != 3 || patches.size(0) != images.size(0) || patches.size(1) != count ||
      patches.size(2) != cutting.elements)
    refuse("patches must have shape [", images.size(0), ", ", count, ", ", cutting.elements, "], got ",
           text(patches.sizes()));
  with_float(patches.scalar_type(), "patches", [&]<typename scalar_t>(Type<scalar_t>) {
    Launch{patches}(scatter_elements<scalar_t>, static_cast<unsigned>(ceil_div(places, kWarps)), dim3(32, kWarps),
                    read<scalar_t>(patches), cutting, ids_of(ids), count, places, written<scalar_t>(images));
  });
  return images;
}

STABLE_TORCH_LIBRARY_IMPL(fastssl, CUDA, m) {
  m.impl("masked_patch_loss", TORCH_BOX(&masked_patch_loss));
  m.impl("masked_patch_loss_backward", TORCH_BOX(&masked_patch_loss_backward));
  m.impl("masked_feature_loss", TORCH_BOX(&masked_feature_loss));
  m.impl("masked_feature_loss_backward", TORCH_BOX(&masked_feature_loss_backward));
  m.impl("gather_patches", TORCH_BOX(&gather_patches));
  m.impl("scatter_patches", TORCH_BOX(&scatter_patches));
}

}  // namespace
}  // namespace fastssl
