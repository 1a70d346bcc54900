// A ring buffer of keys on the GPU (MoCo, arXiv:1911.05722).
//
//     keys[(position + i) mod size] = new_keys[i],  position = (position + B) mod size
//
// for the last `size` of B new keys, which may be normalised on the way: x / max(|x|, 1e-12). A warp takes one key; its
// lanes exchange their sums of squares in a fixed order: the same bits in every run. Each new key is read once, once
// more from the cache if it is normalised, and written once: B D elements each way. The position stays on the GPU; a
// second launch advances it after all blocks of the first have read it.
#include "common/elements.h"
#include "common/launch.h"

namespace fastssl {
namespace {

constexpr int kThreads = 256;

__device__ int64_t modulo(int64_t x, int64_t size) { return (x % size + size) % size; }

// Writes new keys [first, count). Blocks: 8 keys.
template <typename Key, typename New>
__global__ void __launch_bounds__(kThreads, 4)
    enter(Key* keys, int64_t key_row, int64_t key_column, const int64_t* position, const New* new_keys, int64_t new_row,
          int64_t new_column, int64_t first, int64_t count, int64_t size, int64_t dim, bool normalize) {
  const int64_t i = first + int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (i >= count) return;
  const New* const from = new_keys + i * new_row;
  Key* const to = keys + modulo(*position + i, size) * key_row;
  Wide<New> length = 1;
  if (normalize) {
    Wide<New> squares = 0;
    for (int64_t d = threadIdx.x; d < dim; d += 32) {
      const Wide<New> x = static_cast<Wide<New>>(from[d * new_column]);
      squares += x * x;
    }
    length = sqrt(warp_sum(squares));
    if (length < Wide<New>(1e-12)) length = Wide<New>(1e-12);
  }
  for (int64_t d = threadIdx.x; d < dim; d += 32)
    to[d * key_column] = static_cast<Key>(static_cast<Wide<New>>(from[d * new_column]) / length);
}

__global__ void advance(int64_t* position, int64_t count, int64_t size) { *position = modulo(*position + count, size); }

void enqueue_(const Tensor& keys, const Tensor& position, const Tensor& new_keys_, bool normalize) {
  if (keys.dim() != 2 || new_keys_.dim() != 2 || keys.size(1) != new_keys_.size(1))
    refuse("new_keys must have shape (B, D) beside keys of shape (K, D), got ", text(new_keys_.sizes()), " and ",
           text(keys.sizes()));
  if (position.scalar_type() != ScalarType::Long || position.numel() != 1)
    refuse("position must be one int64, got ", position.scalar_type(), " of shape ", text(position.sizes()));
  check_device("position", position, keys);
  check_device("new_keys", new_keys_, keys);
  const int64_t size = keys.size(0), dim = keys.size(1), count = new_keys_.size(0);
  if (size == 0) refuse("keys must have at least one row, got shape ", text(keys.sizes()));
  if (elements(keys) < keys.numel())
    refuse("keys must have no two elements in one place, got strides ", text(keys.strides()));
  if (count == 0) return;
  const bool apart = address(new_keys_) + elements(new_keys_) * new_keys_.element_size() <= address(keys) ||
                     address(keys) + elements(keys) * keys.element_size() <= address(new_keys_);
  const Tensor new_keys = apart ? new_keys_ : torch::stable::clone(new_keys_);
  const int64_t first = std::max<int64_t>(count - size, 0);
  const Launch launch(keys);
  with_float(keys.scalar_type(), "keys", [&]<typename Key>(Type<Key>) {
    with_float(new_keys.scalar_type(), "new_keys", [&]<typename New>(Type<New>) {
      launch(enter<Key, New>, ceil_div(count - first, kThreads / 32), dim3(32, kThreads / 32), written<Key>(keys),
             keys.stride(0), keys.stride(1), position.const_data_ptr<int64_t>(), read<New>(new_keys),
             new_keys.stride(0), new_keys.stride(1), first, count, size, dim, normalize);
    });
  });
  launch(advance, 1, 1, position.mutable_data_ptr<int64_t>(), count, size);
}

STABLE_TORCH_LIBRARY_IMPL(fastssl, CUDA, m) { m.impl("enqueue_", TORCH_BOX(&enqueue_)); }

}  // namespace
}  // namespace fastssl
