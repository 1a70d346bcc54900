// Tiles of exponentials that a forward pass keeps, so that the backward pass need not compute their products again.
//
// They lie in one flat tensor: a header, some numbers of the operation's own, then as many tiles as there is room for,
// one row of tiles after the other; what remains is 0. The exponentials are about the origin that all rows and columns
// share: where there is none, nothing is kept. They are float32, or bfloat16 where the products are.
//
// A backward pass may run with another number of threads or another instruction set, and so cut S differently. The
// header says how S was cut; if the cuts differ, all tiles are computed again.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <cstring>

#include "common/engine.h"
#include "common/schedule.h"

namespace fastssl {

// The tiles of a matrix, and where they lie when stored one after the other. A symmetric matrix has those with I <= J.
struct TileOrder {
  int64_t rows, columns;
  Cut of_rows, of_columns;
  bool symmetric;

  TileOrder(int64_t rows, int64_t columns, int64_t dim, int threads, bool symmetric)
      : rows(rows), columns(columns), of_rows(rows, dim, threads, symmetric),
        of_columns(columns, dim, threads, symmetric), symmetric(symmetric) {}

  int64_t height(int64_t I) const { return of_rows.padded(I, rows); }
  int64_t width(int64_t J) const { return of_columns.padded(J, columns); }
  int64_t padded_columns() const {
    const int64_t last = of_columns.blocks - 1;
    return last < 0 ? 0 : last * of_columns.block + width(last);
  }
  // How many numbers come before tile (I, J), and before its end.
  int64_t begin(int64_t I, int64_t J) const {
    const int64_t block = of_rows.block, above = block * I * padded_columns();
    if (!symmetric) return above + height(I) * J * of_columns.block;
    return above - block * block * (I * (I - 1) / 2) + height(I) * (J - I) * block;
  }
  int64_t end(int64_t I, int64_t J) const { return begin(I, J) + height(I) * width(J); }

  int64_t tiles() const {
    return symmetric ? of_rows.blocks * (of_rows.blocks + 1) / 2 : of_rows.blocks * of_columns.blocks;
  }
  // How many tiles fit into `room` numbers, and how many numbers those tiles hold.
  std::pair<int64_t, int64_t> fitting(int64_t room) const {
    int64_t count = 0, numbers = 0;
    for (int64_t I = 0; I < of_rows.blocks; ++I)
      for (int64_t J = symmetric ? I : 0; J < of_columns.blocks; ++J) {
        if (end(I, J) > room) return {count, numbers};
        numbers = end(I, J);
        ++count;
      }
    return {count, numbers};
  }
};

class KeptTiles {
 public:
  const bool narrow;  // bfloat16

  // For a forward pass to fill, if all rows and columns share an origin.
  KeptTiles(at::Tensor& memory, const TileOrder& order, const Engine& engine, bool shared, float x_square,
            float y_square, int64_t numbers = 0)
      : KeptTiles(memory.mutable_data_ptr(), memory.numel(), order, engine, numbers) {
    if (!memory.numel()) return;
    int64_t used = 0;
    if (shared && room > 0) {
      Header header = expected();
      header.squares[0] = x_square;
      header.squares[1] = y_square;
      std::memset(base, 0, tiles_at);  // so that the same call leaves the same bytes
      std::memcpy(base, &header, sizeof(Header));
      const auto [count, stored] = order.fitting(room);
      tiles = count;
      used = tiles_at + stored * bytes();
    }
    room = tiles ? room : 0;
    if (!tiles) used = 0;
    std::memset(base + used, 0, memory.numel() - used);
  }

  // For a backward pass: as a forward pass has left them.
  KeptTiles(const at::Tensor& memory, const TileOrder& order, const Engine& engine, int64_t numbers = 0)
      : KeptTiles(const_cast<void*>(memory.const_data_ptr()), memory.numel(), order, engine, numbers) {
    if (room <= 0) return;
    Header header;
    const Header wanted = expected();
    std::memcpy(&header, base, sizeof(Header));
    if (std::memcmp(header.cut, wanted.cut, sizeof(header.cut)) == 0) {
      tiles = order.fitting(room).first;
      squares[0] = header.squares[0];
      squares[1] = header.squares[1];
    } else {
      room = 0;
    }
  }

  // How many tiles fit into `size` bytes after the operation's own numbers, and how many numbers those tiles hold.
  static std::pair<int64_t, int64_t> fitting(const TileOrder& order, int64_t size, bool narrow, int64_t numbers) {
    return order.fitting((size - before_tiles(numbers)) / (narrow ? 2 : 4));
  }

  bool any() const { return tiles > 0; }
  bool all() const { return tiles > 0 && tiles == order.tiles(); }

  // Kept tiles imply a shared origin: raises where the inputs do not have one.
  void check(bool shared) const {
    TORCH_CHECK_VALUE(shared || !any(), "kept must be what a forward pass with the same inputs has kept");
  }

  // Where tile (I, J) is kept, or null.
  void* operator()(int64_t I, int64_t J) const {
    return any() && order.end(I, J) <= room ? base + tiles_at + order.begin(I, J) * bytes() : nullptr;
  }
  // Sets the rows of tile (I, J) from r on to 0: rows that only pad it have no weight.
  void pad(int64_t I, int64_t J, int64_t r) const {
    const int64_t row = order.width(J) * bytes();
    if (void* const tile = (*this)(I, J))
      std::memset(static_cast<char*>(tile) + r * row, 0, (order.height(I) - r) * row);
  }
  // Where S_IJ may be computed, to be turned in place into what is kept; or null.
  float* floats(int64_t I, int64_t J) const { return narrow ? nullptr : static_cast<float*>((*this)(I, J)); }

  // The operation's own numbers, or null where nothing is kept.
  float* numbers() const { return any() ? reinterpret_cast<float*>(base + sizeof(Header)) : nullptr; }

  // The largest |z|^2 of side 0 or 1, or null where the side has to find it again.
  const float* largest_square(int side) const { return any() ? squares + side : nullptr; }

 private:
  struct alignas(64) Header {
    int64_t cut[7] = {};
    float squares[2] = {};
  };

  KeptTiles(void* data, int64_t size, const TileOrder& order, const Engine& engine, int64_t numbers)
      : narrow(engine.half()), base(static_cast<char*>(data)), order(order),
        tiles_at(before_tiles(numbers)), room((size - tiles_at) / bytes()) {}

  static int64_t before_tiles(int64_t numbers) { return sizeof(Header) + round_up(numbers * 4, sizeof(Header)); }
  int64_t bytes() const { return narrow ? 2 : 4; }
  Header expected() const {
    constexpr int64_t kKept = 0x6b657074;  // a tensor of zeros keeps nothing
    return {{kKept, order.rows, order.columns, order.of_rows.block, order.of_columns.block, bytes(), order.symmetric}};
  }

  char* base;
  TileOrder order;
  int64_t tiles_at, room;  // bytes before the tiles; numbers that fit after them
  int64_t tiles = 0;
  float squares[2] = {};
};

// How rows x rows similarities are cut, and how many of their tiles a tensor of `keep` bytes holds: for reports and
// tests.
struct TilePlan {
  int threads;     // 1 where the work is too small to share
  int64_t block;   // rows and columns of a tile
  int64_t blocks;  // blocks of rows in the matrix
  int64_t group;   // blocks that one task takes together
  int64_t tiles;   // tiles that are visited
  int64_t kept;    // and how many of them are kept
};

inline TilePlan tile_plan(int64_t rows, int64_t dim, int threads, bool symmetric, int64_t keep, bool narrow) {
  threads = threads_for(rows, rows, dim, threads);
  const TileOrder order(rows, rows, dim, threads, symmetric);
  const Cut& cut = order.of_rows;
  return {threads, cut.block, cut.blocks, cut.group, order.tiles(), KeptTiles::fitting(order, keep, narrow, 0).first};
}

}  // namespace fastssl
