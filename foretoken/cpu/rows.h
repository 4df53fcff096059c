// Rows of numbers: laid so that what is multiplied at once lies together, and written as results.

#pragma once

#include "vectors.h"

namespace {

// Rows that are multiplied together: M of them in as few passes of at most `most` as can be.
struct Passes {
  int64_t count, least, more;

  Passes(int64_t M, int64_t most)
      : count(std::max<int64_t>((M + most - 1) / most, 1)), least(M / count), more(M % count) {}
  int64_t first(int64_t pass) const { return pass * least + std::min(pass, more); }
  int64_t rows(int64_t pass) const { return least + (pass < more); }
};

// A vector of cells from the k-th value on of each of `count` rows of K values, turned: cells[c] holds all c-th ones.
template <class T, int L, class V, class Row>
inline void columns(const Row& row, int64_t count, int64_t k, int64_t K, V (&cells)[L]) {
#pragma GCC unroll 16
  for (int m = 0; m < L; m++) {
    cells[m] = V{};
    if (m >= count) continue;
    if (k + L * Kind<T>::pair <= K) cells[m] = load<V>(row(m) + k);
    else std::memcpy(&cells[m], row(m) + k, sizeof(T) * (K - k));
  }
  turn<typename Squares<T>::Index>(cells);
}

// The parts [parts, ..] of a vector of cells, `stride` apart.
template <class T, class V>
inline void put_parts(V cells, int64_t stride, typename Kind<T>::Part* to) {
  if constexpr (Kind<T>::parts == 1) {
    std::memcpy(to, &cells, 64);
  } else {
    const auto first = Kind<T>::template part<0>(cells), second = Kind<T>::template part<1>(cells);
    std::memcpy(to, &first, 64);
    std::memcpy(to + stride, &second, 64);
  }
}

// M rows of K values in parts [K / pair, parts, M]: what is multiplied at once lies together. Writes a square too far.
template <class T, class Row>
void interleave(const Row& row, int64_t M, int64_t K, typename Kind<T>::Part* out) {
  constexpr int P = Kind<T>::pair, PARTS = Kind<T>::parts, L = Kind<T>::lanes;
  for (int64_t k = 0; k < K; k += L * P) {
    auto* at = out + k / P * PARTS * M;
    if (M == 1) {
      T line[L * P] = {};
      std::memcpy(line, row(0) + k, sizeof(T) * std::min<int64_t>(L * P, K - k));
      Kind<T>::part_line(at, line);
      continue;
    }
    typename Squares<T>::Vec cells[L];
    columns<T>(row, M, k, K, cells);
    for (int c = 0; c < L; c++) put_parts<T>(cells[c], M, at + c * PARTS * M);
  }
}

// y = sums + bias, `width` of a block's.
template <class T>
inline void give(const typename Kind<T>::Sum* sums, const T* bias, int64_t width, T* y) {
  using K = Kind<T>;
  int64_t n = 0;
  for (; n + K::lanes <= width; n += K::lanes) {
    const auto sum = load<typename K::Vec>(sums + n);
    K::put(y + n, bias ? sum + K::values(bias + n) : sum);
  }
  for (; n < width; n++) y[n] = T(sums[n] + (bias ? typename K::Sum(bias[n]) : typename K::Sum(0)));
}

}  // namespace
