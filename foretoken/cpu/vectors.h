// Vectors of numbers, and how each type is loaded, multiplied and stored.
//
// They are those of GCC and Clang, 64 bytes wide: registers of AVX-512, pairs of them elsewhere.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using std::int64_t;

constexpr std::uint32_t HIGH = 0xffff0000u;  // of two neighbours of bfloat16, the second as a float

using Floats = float __attribute__((vector_size(64)));
using Doubles = double __attribute__((vector_size(64)));
using Ints = std::int32_t __attribute__((vector_size(64)));
using Words = std::uint32_t __attribute__((vector_size(64)));
using Longs = int64_t __attribute__((vector_size(64)));

template <class V, class P>
inline V load(const P* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// How a type is multiplied. A cell is what one lane takes at once: two neighbours of bfloat16, else one value. It is
// multiplied in parts: as it is, or, where there is no product of bfloat16, as two floats.
template <class T>
struct Kind;

// A type that is summed as it is.
template <class F, class V>
struct Single {
  using Sum = F;
  using Vec = V;
  static constexpr int pair = 1, lanes = sizeof(V) / sizeof(F);
  using Part = F;
  static constexpr int parts = 1;
  static Vec cells(const F* p) { return load<Vec>(p); }
  static Vec mac(Vec a, Vec w, Vec x) { return a + w * x; }
  static Vec mac(Vec a, Vec w, Part x) { return a + w * x; }
  template <int>
  static Vec part(Vec cell) { return cell; }
  static void part_line(Part* to, const F* cells) { std::memcpy(to, cells, 64); }
  static Vec values(const F* p) { return load<Vec>(p); }
  static void put(F* p, Vec v) { std::memcpy(p, &v, 64); }
};

template <>
struct Kind<float> : Single<float, Floats> {};
template <>
struct Kind<double> : Single<double, Doubles> {};

template <>
struct Kind<c10::BFloat16> {
  using Sum = float;
  using Vec = Floats;
  static constexpr int pair = 2, lanes = 16;
  static Words cells(const c10::BFloat16* p) { return load<Words>(p); }
#if defined(__AVX512BF16__)
  using Part = std::uint32_t;
  static constexpr int parts = 1;
  static Vec mac(Vec a, Words w, Words x) { return (Vec)_mm512_dpbf16_ps((__m512)a, (__m512bh)w, (__m512bh)x); }
  static Vec mac(Vec a, Words w, Part x) { return mac(a, w, Words{} + x); }
  template <int>
  static Words part(Words cell) { return cell; }
  static void part_line(Part* to, const c10::BFloat16* cells) { std::memcpy(to, cells, 64); }
#else
  using Part = float;
  static constexpr int parts = 2;
  static Vec mac(Vec a, Words w, Words x) { return mac(mac(a, part<0>(w), part<0>(x)), part<1>(w), part<1>(x)); }
  static Vec mac(Vec a, Vec w, Vec x) { return a + w * x; }
  static Vec mac(Vec a, Vec w, Part x) { return a + w * x; }
  template <int SECOND>
  static Vec part(Words cell) { return (Vec)(SECOND ? cell & HIGH : cell << 16); }
  static void part_line(Part* to, const c10::BFloat16* cells) {
    for (int i = 0; i < 2 * lanes; i += lanes) {
      const Vec v = values(cells + i);
      std::memcpy(to + i, &v, 64);
    }
  }
#endif
  static Vec values(const c10::BFloat16* p) {
    using Half = std::uint16_t __attribute__((vector_size(32)));
#if defined(__AVX512F__)
    return (Vec)((Words)_mm512_cvtepu16_epi32((__m256i)load<Half>(p)) << 16);  // GCC 12 takes four instructions for one
#else
    return (Vec)(__builtin_convertvector(load<Half>(p), Words) << 16);
#endif
  }
  static void put(c10::BFloat16* p, Vec v) {
    using Half = std::uint16_t __attribute__((vector_size(32)));
    const Words x = (Words)v, even = x + 0x7fffu + (x >> 16 & 1u);
    const Half h = __builtin_convertvector((v == v ? even : Words{} + 0x7fc00000u) >> 16, Half);
    std::memcpy(p, &h, 32);
  }
};

// Of rows STEP apart, exchange the lanes off the diagonal.
template <int STEP, class Index, class V, int... I>
inline void swap_lanes(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  const Index low = {(I & STEP ? L + (I ^ STEP) : I)...}, high = {(I & STEP ? L + I : (I ^ STEP))...};
  const V upper = __builtin_shuffle(a, b, low), lower = __builtin_shuffle(a, b, high);
  a = upper;
  b = lower;
}

// A square of cells turned: row i lane j becomes row j lane i.
template <class Index, int STEP = 1, int L, class V>
inline void turn(V (&rows)[L]) {
  if constexpr (STEP < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (!(i & STEP)) swap_lanes<STEP, Index>(rows[i], rows[i + STEP], std::make_integer_sequence<int, L>{});
    turn<Index, 2 * STEP>(rows);
  }
}

template <class T>
struct Squares {  // of bfloat16 and float: 16 x 16 words
  using Vec = Words;
  using Index = Ints;
};
template <>
struct Squares<double> {
  using Vec = Doubles;
  using Index = Longs;
};

}  // namespace
