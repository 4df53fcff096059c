// Few rows times packed weights, at the speed of memory.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "crew.h"
#include "rows.h"

namespace {

using at::Tensor;

// Rows whose accumulators, two vectors of outputs each, fit in registers.
#if defined(__AVX512F__)
constexpr int ROWS = 12;
#else
constexpr int ROWS = 3;
#endif
constexpr int64_t SPAN = 64;  // cells of a block that all rows pass before the next ones, while those are fetched

// Whether one or two rows fetch weights ahead as well: Intel's processors read faster so, AMD's do by themselves.
#if defined(__x86_64__) && defined(__GNUC__)
const bool FETCHES = __builtin_cpu_is("intel");
#else
constexpr bool FETCHES = false;
#endif

// Most rows that are multiplied together: no more than a square of cells has.
template <class T>
constexpr int rows_of() {
  return std::min(ROWS, Kind<T>::lanes);
}

// Outputs of one block of weights: two vectors of lanes.
template <class T>
constexpr int64_t block_of() {
  return 2 * Kind<T>::lanes;
}

// y [M, block] += x w^T for `cells` of one block of packed weights; fetches what lies a span behind them.
template <class T, int M>
void tile(const T* w, const typename Kind<T>::Part* x, int64_t cells, typename Kind<T>::Sum* y) {
  using K = Kind<T>;
  constexpr int P = K::pair, L = K::lanes;
  constexpr int64_t BLOCK = block_of<T>();
  typename K::Vec a[M], b[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) {
    a[m] = load<typename K::Vec>(y + m * BLOCK);
    b[m] = load<typename K::Vec>(y + m * BLOCK + L);
  }
  for (int64_t k = 0; k < cells; k++, w += BLOCK * P, x += M * K::parts) {
    if (M > 2 || FETCHES) fetch(w + SPAN * BLOCK * P, BLOCK * P);
    const auto w0 = K::cells(w), w1 = K::cells(w + L * P);
    const auto step = [&](auto u, auto v, const auto* part) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) {
        a[m] = K::mac(a[m], u, part[m]);
        b[m] = K::mac(b[m], v, part[m]);
      }
    };
    step(K::template part<0>(w0), K::template part<0>(w1), x);
    if constexpr (K::parts == 2) step(K::template part<1>(w0), K::template part<1>(w1), x + M);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) {
    std::memcpy(y + m * BLOCK, &a[m], 64);
    std::memcpy(y + m * BLOCK + L, &b[m], 64);
  }
}

template <class T>
using Tile = void (*)(const T*, const typename Kind<T>::Part*, int64_t, typename Kind<T>::Sum*);

template <class T, int... M>
Tile<T> tile_of(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr Tile<T> table[] = {tile<T, M + 1>...};
  return table[rows - 1];
}

template <class T>
void multiply(const Tensor& x, const Tensor& packed, const T* bias, Tensor& y) {
  using Part = typename Kind<T>::Part;
  using Sum = typename Kind<T>::Sum;
  constexpr int64_t P = Kind<T>::pair, PARTS = Kind<T>::parts, BLOCK = block_of<T>();
  const int64_t K = x.size(-1), M = x.numel() / K, N = y.size(-1), cells = (K + P - 1) / P;
  const Passes passes(M, rows_of<T>());
  const T *xs = x.const_data_ptr<T>(), *ws = packed.const_data_ptr<T>();
  T* ys = y.data_ptr<T>();
  const int64_t blocks = (N + BLOCK - 1) / BLOCK;
  if (Crew::led) Crew::led->note({reinterpret_cast<const char*>(ws), blocks, cells * P * BLOCK * int64_t(sizeof(T))});
  share(blocks, [&](Items items) {
    static thread_local std::vector<Part> rows;
    static thread_local std::vector<Sum> sums;
    const int64_t most = (M * (cells + 16) + 16 * 16) * PARTS;
    if (int64_t(rows.size()) < most) rows.resize(most);
    for (int64_t pass = 0; pass < passes.count; pass++) {
      const T* from = xs + passes.first(pass) * K;
      interleave<T>([&](int64_t m) { return from + m * K; }, passes.rows(pass), K,
                    rows.data() + passes.first(pass) * cells * PARTS);
    }
    const int64_t span = passes.count > 1 ? SPAN : cells;
    for (int64_t block; (block = items.next()) >= 0;) {
      const int64_t n0 = block * BLOCK, width = std::min(BLOCK, N - n0);
      sums.assign(M * BLOCK, Sum(0));
      for (int64_t cell = 0; cell < cells; cell += span)
        for (int64_t pass = 0; pass < passes.count; pass++) {
          const int64_t m0 = passes.first(pass), count = passes.rows(pass);
          const auto work = tile_of<T>(count, std::make_integer_sequence<int, rows_of<T>()>{});
          work(ws + (block * cells + cell) * P * BLOCK, rows.data() + (m0 * cells + count * cell) * PARTS,
               std::min(span, cells - cell), sums.data() + m0 * BLOCK);
        }
      for (int64_t m = 0; m < M; m++)
        give(sums.data() + m * BLOCK, bias ? bias + n0 : nullptr, width, ys + m * N + n0);
    }
  });
}

}  // namespace
