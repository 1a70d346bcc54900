// Which thread takes which tile of a matrix, and in what order.
//
// A matrix is cut into blocks of rows and of columns; a tile is small enough for the second-level cache.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/engine.h"

namespace fastssl {

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t pieces(int64_t x, int64_t size) { return (x + size - 1) / size; }

// How many threads share M x N similarities of D features: one where starting more would cost more than it gains.
inline int threads_for(int64_t M, int64_t N, int64_t D, int threads = at::get_num_threads()) {
  return double(M) * double(N) * double(D) < double(1 << 20) ? 1 : threads;
}

// Calls `task(i)` for i in [0, count) on `threads` threads; each thread calls `done()` when it has no more tasks.
template <typename Task, typename Done>
void run(int threads, int64_t count, const Task& task, const Done& done) {
  const auto tasks = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
    done();
  };
  if (threads == 1) {
    if (count) tasks(0, count);
  } else {
    at::parallel_for(0, count, 1, tasks);
  }
}

template <typename Task>
void run(int threads, int64_t count, const Task& task) {
  run(threads, count, task, [] {});
}

// The calling thread's number among `threads`.
inline int slot(int threads) { return threads == 1 ? 0 : at::get_thread_num(); }

// How rows are cut: into `blocks` blocks of `block` rows. One task takes `group` of them together, to read memory less
// often.
struct Cut {
  int64_t block, blocks, group;

  // `symmetric`: for a tournament, else for a match.
  Cut(int64_t rows, int64_t dim, int threads, bool symmetric = true) {
    const int64_t padded = round_up(std::max<int64_t>(dim, 1), kPadding);
    // A tile, its operands and its outputs share the second-level cache.
    block = padded <= 256 ? 256 : padded <= 768 ? 128 : 64;
    // Every thread gets work in every round. A match needs one block for each thread, a tournament two, and some more
    // to balance the load.
    while (block > 64 && rows < (symmetric ? 4 : 1) * threads * block) block /= 2;
    if (threads > 1 && rows < threads * block) block = 32;
    block = std::min(block, round_up(std::max<int64_t>(rows, 1), kPadding));
    blocks = pieces(rows, block);
    group = 1;
    // Where as many groups as threads, or a multiple, have all blocks, no thread waits for another's larger share; a
    // tournament needs more of them.
    const auto even = [&](int64_t size) { return !symmetric && blocks % (size * threads) == 0; };
    while (group < 4 && (blocks >= 8 * threads * group || even(2 * group))) group *= 2;
  }

  int64_t groups() const { return pieces(blocks, group); }
  int64_t padded(int64_t b, int64_t rows) const { return round_up(std::min(block, rows - b * block), kPadding); }

  template <typename F>
  void each(int64_t g, const F& f) const {
    for (int64_t b = g * group; b < std::min((g + 1) * group, blocks); ++b) f(b);
  }
};

// Calls visit(I, J) for every pair of blocks I <= J. Two calls that share a block never run at once, and come in the
// same order in every run: what a block gathers has the same bits whichever thread runs which tile. Groups of blocks
// are the players of a round-robin tournament (the circle method).
template <typename Visit, typename Done>
void tournament(int threads, const Cut& cut, const Visit& visit, const Done& done) {
  const int64_t players = cut.groups();
  // Round 0: every player against itself.
  run(threads, players, [&](int64_t p) {
    cut.each(p, [&](int64_t i) {
      cut.each(p, [&](int64_t j) {
        if (i <= j) visit(i, j);
      });
    });
  }, done);
  // The last player keeps its seat, the others rotate; with an odd number of players one rests in each round.
  const int64_t seats = players + players % 2, turning = seats - 1;
  for (int64_t round = 0; round < (players > 1 ? turning : 0); ++round) {
    run(threads, seats / 2, [&](int64_t table) {
      int64_t p = table == 0 ? turning : (round + table) % turning;
      int64_t q = table == 0 ? round : (round - table + turning) % turning;
      if (p > q) std::swap(p, q);
      if (q >= players) return;
      cut.each(p, [&](int64_t i) { cut.each(q, [&](int64_t j) { visit(i, j); }); });
    }, done);
  }
}

// The same for every pair of a block of rows I and a block of columns J. In round k, group p of the side with fewer
// groups meets group p + k of the other, modulo the larger number of groups. A block that has met all others is
// finished by the thread that has it in its cache: row_finished(I), column_finished(J).
template <typename Visit, typename RowFinished, typename ColumnFinished, typename Done>
void match(int threads, const Cut& rows, const Cut& columns, const Visit& visit, const RowFinished& row_finished,
           const ColumnFinished& column_finished, const Done& done) {
  const int64_t P = rows.groups(), Q = columns.groups(), tables = std::min(P, Q), rounds = std::max(P, Q);
  for (int64_t round = 0; round < rounds; ++round) {
    run(threads, tables, [&](int64_t table) {
      const int64_t guest = (table + round) % rounds, p = P <= Q ? table : guest, q = P <= Q ? guest : table;
      rows.each(p, [&](int64_t i) { columns.each(q, [&](int64_t j) { visit(i, j); }); });
      // The last table of a guest is the first, or if it sat there before the last round, the one after its own number.
      const bool last = round == rounds - 1, guest_leaves = guest < tables - 1 ? last : table == 0;
      if (P <= Q ? last : guest_leaves) rows.each(p, row_finished);
      if (P <= Q ? guest_leaves : last) columns.each(q, column_finished);
    }, done);
  }
  // Nobody met: one side has no blocks.
  for (int64_t p = 0; tables == 0 && p < P; ++p) rows.each(p, row_finished);
  for (int64_t q = 0; tables == 0 && q < Q; ++q) columns.each(q, column_finished);
}

template <typename Visit, typename Done>
void match(int threads, const Cut& rows, const Cut& columns, const Visit& visit, const Done& done) {
  match(threads, rows, columns, visit, [](int64_t) {}, [](int64_t) {}, done);
}

}  // namespace fastssl
