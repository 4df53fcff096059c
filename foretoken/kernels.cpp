// One decoding step on a processor: few rows against all weights, few queries against a long cache.
//
// Whatever the number of rows, every sum is taken in the same order: an output of `linear` over its inputs one after
// the other, one of `attend` over positions, not slots. A node of a tree so gets the very bits that it would get if its
// path were decoded token by token, in any batch, in every type.
//
// Vectors are those of GCC and Clang, 64 bytes wide: registers of AVX-512, pairs of them elsewhere.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using std::int64_t;

// Rows whose accumulators fit in registers: times two vectors of outputs, times a tree of partial sums of scores, times
// four vectors of values.
#if defined(__AVX512F__)
constexpr int ROWS = 12, TURNED = 4, MIXED = 6;
#else
constexpr int ROWS = 3, TURNED = 1, MIXED = 4;
#endif
constexpr int64_t SPAN = 64;    // cells of a block that all rows pass before the next ones, while those are fetched
constexpr int64_t CHUNK = 512;  // positions whose attention is one piece of work
constexpr int64_t AHEAD = 64;   // positions whose keys are fetched before they are used
constexpr std::uint32_t HIGH = 0xffff0000u;  // of two neighbours of bfloat16, the second as a float

// Whether one or two rows fetch weights ahead as well: Intel's processors read faster so, AMD's do by themselves.
#if defined(__x86_64__) && defined(__GNUC__)
const bool FETCHES = __builtin_cpu_is("intel");
#else
constexpr bool FETCHES = false;
#endif

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

// Begin to bring `count` values nearer; it does no harm if there are none.
template <class T>
inline void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// How a type is multiplied. A cell is what one lane takes at once: two neighbours of bfloat16, else one value. It is
// multiplied in parts: as it is, or, where there is no product of bfloat16, as two floats.
template <class T>
struct Kind;

template <>
struct Kind<float> {
  using Sum = float;
  using Vec = Floats;
  static constexpr int pair = 1, lanes = 16;
  using Part = float;
  static constexpr int parts = 1;
  static Vec cells(const float* p) { return load<Vec>(p); }
  static Vec mac(Vec a, Vec w, Vec x) { return a + w * x; }
  static Vec mac(Vec a, Vec w, Part x) { return a + w * x; }
  template <int>
  static Vec part(Vec cell) { return cell; }
  static void part_line(Part* to, const float* cells) { std::memcpy(to, cells, 64); }
  static Vec values(const float* p) { return load<Vec>(p); }
  static void put(float* p, Vec v) { std::memcpy(p, &v, 64); }
};

template <>
struct Kind<double> {
  using Sum = double;
  using Vec = Doubles;
  static constexpr int pair = 1, lanes = 8;
  using Part = double;
  static constexpr int parts = 1;
  static Vec cells(const double* p) { return load<Vec>(p); }
  static Vec mac(Vec a, Vec w, Vec x) { return a + w * x; }
  static Vec mac(Vec a, Vec w, Part x) { return a + w * x; }
  template <int>
  static Vec part(Vec cell) { return cell; }
  static void part_line(Part* to, const double* cells) { std::memcpy(to, cells, 64); }
  static Vec values(const double* p) { return load<Vec>(p); }
  static void put(double* p, Vec v) { std::memcpy(p, &v, 64); }
};

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

// ---------------------------------------------------------------------------------------------------------- linear

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

template <class T>
void multiply(const Tensor& x, const Tensor& packed, const T* bias, Tensor& y) {
  using Part = typename Kind<T>::Part;
  using Sum = typename Kind<T>::Sum;
  constexpr int64_t P = Kind<T>::pair, PARTS = Kind<T>::parts, BLOCK = block_of<T>();
  const int64_t M = x.size(0), K = x.size(1), N = y.size(1), cells = (K + P - 1) / P;
  const Passes passes(M, rows_of<T>());
  const T *xs = x.const_data_ptr<T>(), *ws = packed.const_data_ptr<T>();
  T* ys = y.data_ptr<T>();
  at::parallel_for(0, (N + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<Part> rows;
    static thread_local std::vector<Sum> sums;
    const int64_t most = (M * (cells + 16) + 16 * 16) * PARTS;
    if (int64_t(rows.size()) < most) rows.resize(most);
    for (int64_t pass = 0; pass < passes.count; pass++) {
      const T* from = xs + passes.first(pass) * x.stride(0);
      interleave<T>([&](int64_t m) { return from + m * x.stride(0); }, passes.rows(pass), K,
                    rows.data() + passes.first(pass) * cells * PARTS);
    }
    const int64_t span = passes.count > 1 ? SPAN : cells;
    for (int64_t block = begin; block < end; block++) {
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

// ------------------------------------------------------------------------------------------------------- attention

inline Floats exponential(Floats x) {
  // Cephes' expf: 2^n times a polynomial of the remainder
  const Floats low = Floats{} - 87.0f, magic = Floats{} + 12582912.0f;
  x = x < low ? low : x;
  const Floats n = (x * 1.44269504f + magic) - magic;
  const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Floats y = Floats{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return y * (Floats)power;
}

inline Doubles exponential(Doubles x) {
  for (int i = 0; i < 8; i++) x[i] = std::exp(x[i]);
  return x;
}

// The heads of one layer that share keys, what their queries see, and a chunk of positions: one piece of work.
template <class T>
struct Head {
  using K = Kind<T>;
  using Sum = typename K::Sum;
  const T *query, *keys, *values;  // [N, G, D] by strides; [S, D]; [S, E]
  int64_t by_node, by_head, key_stride, value_stride;
  int64_t N, M, G, D, E, S;        // queries, nodes in flight, heads of a group, sizes of a key and a value, slots
  int64_t length, window;          // committed tokens; 0: all of them are seen
  const int64_t* plan;             // [N, 2 + M]
  Sum scale, cap;
  int64_t low;                     // the chunk's first position

  int64_t high() const { return low + CHUNK; }
  int64_t committed() const { return std::min(high(), length); }
  // The first position that any query sees, or a few before it.
  int64_t oldest() const { return window > 0 ? std::max(low, (length - window + 1) / K::lanes * K::lanes) : low; }

  int64_t slot(int64_t position) const { return position < S ? position : position % S; }
  const T* key(int64_t position) const { return keys + slot(position) * key_stride; }
  const T* value(int64_t position) const { return values + slot(position) * value_stride; }
  const T* query_of(int64_t q) const { return query + q / G * by_node + q % G * by_head; }
};

// What a thread works in.
struct Room {
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines[4];
  std::vector<int64_t> path, depth;

  // Room `which` for `count` values, of which nothing is known.
  template <class V>
  V* of(int which, int64_t count) {
    const size_t size = (count * sizeof(V) + 63) / 64;
    if (lines[which].size() < size) lines[which].resize(size);
    return reinterpret_cast<V*>(lines[which].data());
  }
};

// The sums of L vectors, one to a lane: neighbours first.
template <class Index, int STEP = 1, int L, class V>
inline V totals_of(V (&rows)[L]) {
  if constexpr (STEP < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2 * STEP) {
      swap_lanes<STEP, Index>(rows[i], rows[i + STEP], std::make_integer_sequence<int, L>{});
      rows[i] += rows[i + STEP];
    }
    return totals_of<Index, 2 * STEP>(rows);
  } else return rows[0];
}

// The queries of a head against squares of keys. Few are multiplied with keys as they lie, and lanes are added in the
// end; many with keys that were turned once for all of them. Products are added in the same order.
template <class T>
struct Queries {
  using K = Kind<T>;
  using Sum = typename K::Sum;
  using Vec = typename K::Vec;
  using Part = typename K::Part;
  static constexpr int L = K::lanes, VALUES = L * K::pair, PARTS = K::parts;
  template <int M>
  struct Sums {
    Vec of[M];
  };

  const Head<T>& h;
  const int64_t Q = h.N * h.G, vectors = (h.D + VALUES - 1) / VALUES, size = vectors * VALUES;
  const bool turned = TURNED > 1 && Q > (PARTS > 1 ? 2 : 2 * vectors);  // it costs less than it spares
  const Passes passes{Q, TURNED};
  T *rows = nullptr, *square = nullptr;     // as they lie: queries [Q, size], and keys [L, size] of other sizes
  Part *parts = nullptr, *keys = nullptr;  // turned: queries, interleaved by passes, and keys [vectors, L, PARTS, L]

  Queries(const Head<T>& h, Room& room) : h(h) {
    if (turned) {
      parts = room.of<Part>(0, (Q * vectors + L) * L * PARTS);
      keys = room.of<Part>(1, vectors * L * PARTS * L);
      for (int64_t pass = 0; pass < passes.count; pass++) {
        const int64_t q = passes.first(pass);
        interleave<T>([&](int64_t m) { return h.query_of(q + m); }, passes.rows(pass), h.D,
                      parts + q * vectors * L * PARTS);
      }
    } else {
      rows = room.of<T>(0, Q * size);
      square = room.of<T>(1, L * size);
      for (int64_t q = 0; q < Q; q++) whole(h.query_of(q), rows + q * size);
    }
  }

  // Scores [Q, L] of all queries and the L keys at `key(i)`.
  template <class Row>
  void score(const Row& key, Sum* out, int64_t stride) {
    if (!turned) return score_as_they_lie(key, out, stride);
    for (int64_t c = 0; c < vectors; c++) {
      typename Squares<T>::Vec cells[L];
      columns<T>(key, L, c * VALUES, h.D, cells);
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) put_parts<T>(cells[l], L, keys + (c * L + l) * PARTS * L);
    }
    for (int64_t pass = 0; pass < passes.count; pass++) {
      const int64_t q = passes.first(pass);
      score_turned(parts + q * vectors * L * PARTS, passes.rows(pass), out + q * stride, stride,
                   std::make_integer_sequence<int, TURNED>{});
    }
  }

 private:
  void whole(const T* values, T* to) const { std::fill_n(std::copy_n(values, h.D, to), size - h.D, T(0)); }

  void put(Vec scores, Sum* out) const {
    scores *= h.scale;
    if (h.cap > 0)
      for (int l = 0; l < L; l++) scores[l] = h.cap * std::tanh(scores[l] / h.cap);
    std::memcpy(out, &scores, 64);
  }

  template <class Row>
  void score_as_they_lie(const Row& key, Sum* out, int64_t stride) const {
    const T* lines[L];
    for (int i = 0; i < L; i++) {
      lines[i] = key(i);
      if (h.D == size) continue;
      whole(lines[i], square + i * size);
      lines[i] = square + i * size;
    }
    for (int64_t q = 0; q < Q; q++) {
      Vec sums[L] = {};
      for (int64_t k = 0; k < size; k += VALUES) {
        const auto x = K::cells(rows + q * size + k);
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) sums[i] = K::mac(sums[i], K::cells(lines[i] + k), x);
      }
      put(totals_of<typename Squares<T>::Index>(sums), out + q * stride);
    }
  }

  template <int... M>
  void score_turned(const Part* x, int64_t count, Sum* out, int64_t stride, std::integer_sequence<int, M...>) const {
    static constexpr void (Queries::*table[])(const Part*, Sum*, int64_t) const = {&Queries::score_few<M + 1>...};
    (this->*table[count - 1])(x, out, stride);
  }

  template <int M>
  void score_few(const Part* x, Sum* out, int64_t stride) const {
    const auto sums = sum<M, 0, L>(x);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) put(sums.of[m], out + m * stride);
  }

  // Of M queries, the products with the cells FIRST .. FIRST + COUNT of all vectors: neighbours first, as `totals_of`.
  template <int M, int FIRST, int COUNT>
  inline __attribute__((always_inline)) Sums<M> sum(const Part* x) const {
    Sums<M> sums = {};
    if constexpr (COUNT > 1) {
      sums = sum<M, FIRST, COUNT / 2>(x);
      const auto others = sum<M, FIRST + COUNT / 2, COUNT / 2>(x);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums.of[m] += others.of[m];
    } else {
      for (int64_t c = 0; c < vectors; c++)
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
          const int64_t i = (c * L + FIRST) * PARTS + part;
          const auto key = load<decltype(K::template part<0>(K::cells(square)))>(keys + i * L);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) sums.of[m] = K::mac(sums.of[m], key, x[i * M + m]);
        }
    }
    return sums;
  }
};

// A vector, or its first `count` values and zeros.
template <bool WHOLE, class V, class P>
inline V load_some(const P* from, int64_t count) {
  if constexpr (WHOLE) return load<V>(from);
  V v = {};
  std::memcpy(&v, from, sizeof(P) * count);
  return v;
}

// sums [M, WIDE vectors] += weights [M, positions begin .. end) times what lies at `row(position)`: `count` values of one
// vector if that is not WHOLE.
template <class T, int M, int WIDE, bool WHOLE, class Row>
inline void mix_vectors(const Row& row, int64_t begin, int64_t end, const typename Kind<T>::Sum* weight, int64_t stride,
                        typename Kind<T>::Sum* sums, int64_t E, int64_t count) {
  using K = Kind<T>;
  constexpr int L = K::lanes;
  typename K::Vec s[M][WIDE];
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int i = 0; i < WIDE; i++) s[m][i] = load_some<WHOLE, typename K::Vec>(sums + m * E + i * L, count);
  T part[L] = {};
  for (int64_t p = begin; p < end; p++) {
    if (!WHOLE) std::copy_n(row(p), count, part);
    typename K::Vec v[WIDE];
#pragma GCC unroll 4
    for (int i = 0; i < WIDE; i++) v[i] = K::values(WHOLE ? row(p) + i * L : part);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int i = 0; i < WIDE; i++) s[m][i] += v[i] * weight[m * stride + (p - begin)];
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int i = 0; i < WIDE; i++) std::memcpy(sums + m * E + i * L, &s[m][i], sizeof(*sums) * (WHOLE ? L : count));
}

// sums [M, E] += weights [M, positions begin .. end) times the values [E] at `row(position)`.
template <class T, int M, class Row>
void mix_few(const Row& row, int64_t begin, int64_t end, const typename Kind<T>::Sum* weight, int64_t stride,
             typename Kind<T>::Sum* sums, int64_t E) {
  constexpr int64_t L = Kind<T>::lanes;
  int64_t e = 0;
  const auto from = [&](int64_t p) { return row(p) + e; };
  for (; e + 4 * L <= E; e += 4 * L) mix_vectors<T, M, 4, true>(from, begin, end, weight, stride, sums + e, E, L);
  for (; e + L <= E; e += L) mix_vectors<T, M, 1, true>(from, begin, end, weight, stride, sums + e, E, L);
  if (e < E) mix_vectors<T, M, 1, false>(from, begin, end, weight, stride, sums + e, E, E - e);
}

// The same for Q of them.
template <class T, class Row, int... M>
void mix(const Row& row, int64_t begin, int64_t end, const typename Kind<T>::Sum* weight, int64_t stride,
         typename Kind<T>::Sum* sums, int64_t E, int64_t Q, std::integer_sequence<int, M...>) {
  static constexpr decltype(&mix_few<T, 1, Row>) table[] = {mix_few<T, M + 1, Row>...};
  const Passes passes(Q, sizeof...(M));
  for (int64_t pass = 0; pass < passes.count; pass++) {
    const int64_t q = passes.first(pass);
    table[passes.rows(pass) - 1](row, begin, end, weight + q * stride, stride, sums + q * E, E);
  }
}

// The largest of scores [begin, end).
template <class T>
typename Kind<T>::Sum highest(const typename Kind<T>::Sum* scores, int64_t begin, int64_t end) {
  using K = Kind<T>;
  auto top = -std::numeric_limits<typename K::Sum>::infinity();
  int64_t p = begin;
  if (begin + K::lanes <= end) {
    auto tops = load<typename K::Vec>(scores + p);
    for (p += K::lanes; p + K::lanes <= end; p += K::lanes) {
      const auto s = load<typename K::Vec>(scores + p);
      tops = s > tops ? s : tops;
    }
    for (int i = 0; i < K::lanes; i++) top = std::max(top, tops[i]);
  }
  for (; p < end; p++) top = std::max(top, scores[p]);
  return top;
}

// Weights in place of scores [begin, end); returns their sum. `top` is the largest score.
template <class T>
typename Kind<T>::Sum soften(typename Kind<T>::Sum* scores, int64_t begin, int64_t end,
                             typename Kind<T>::Sum top) {
  using K = Kind<T>;
  typename K::Vec total = {};
  for (int64_t p = begin / K::lanes * K::lanes; p < end; p += K::lanes) {
    auto s = exponential(load<typename K::Vec>(scores + p) - top);
    if (p < begin || p + K::lanes > end)
      for (int i = 0; i < K::lanes; i++)
        if (p + i < begin || p + i >= end) s[i] = 0;
    std::memcpy(scores + p, &s, 64);
    total += s;
  }
  typename K::Sum sum = 0;
  for (int i = 0; i < K::lanes; i++) sum += total[i];
  return sum;
}

// Scores of the chunk's committed positions; brings keys and values nearer, at last the keys of the next piece.
template <class T>
void score_committed(const Head<T>& h, const Head<T>* next, Queries<T>& queries, typename Kind<T>::Sum* scores,
                     int64_t stride) {
  constexpr int64_t L = Kind<T>::lanes;
  const int64_t committed = h.committed();
  for (int64_t p = h.oldest(); p < committed; p += L) {
    const int64_t ahead = p + AHEAD;
    if (ahead < committed) fetch(h.key(ahead), L * h.key_stride);
    else if (next) fetch(next->key(next->oldest() + ahead - committed), L * h.key_stride);
    fetch(h.value(p), L * h.value_stride);
    queries.score([&](int64_t i) { return h.key(std::min(p + i, committed - 1)); }, scores + (p - h.low), stride);
  }
}

// Which nodes in flight each query sees: its path, itself at the end.
template <class T>
void find_paths(const Head<T>& h, Room& room) {
  room.path.resize(h.N * h.M);
  room.depth.resize(h.N);
  for (int64_t n = 0; n < h.N; n++) {
    int64_t depth = 0;
    for (int64_t j = 0; j < h.M; j++)
      if (h.plan[n * (2 + h.M) + 2 + j]) room.path[n * h.M + depth++] = j;
    room.depth[n] = depth;
  }
}

// The chunk's part of each query's attention: sums [Q, E], and per query its largest score and the sum of weights.
template <class T>
void attend_chunk(const Head<T>& h, const Head<T>* next, Room& room, typename Kind<T>::Sum* sums,
                  typename Kind<T>::Sum* tops, typename Kind<T>::Sum* totals) {
  using Sum = typename Kind<T>::Sum;
  constexpr int64_t L = Kind<T>::lanes, stride = CHUNK + L;
  const int64_t Q = h.N * h.G, low = h.low, high = h.high(), committed = h.committed(), oldest = h.oldest();
  const int64_t padded = (h.M + L - 1) / L * L;
  const bool branches = high > h.length;
  Queries<T> queries(h, room);
  Sum *scores = room.of<Sum>(2, Q * stride), *branch = room.of<Sum>(3, Q * padded);
  score_committed(h, next, queries, scores, stride);
  for (int64_t node = 0; branches && node < h.M; node += L)
    queries.score([&](int64_t i) { return h.key(h.length + std::min(node + i, h.M - 1)); }, branch + node, padded);
  find_paths(h, room);
  std::fill_n(sums, Q * h.E, Sum(0));
  for (int64_t q = 0; q < Q; q++) {
    const int64_t n = q / h.G, end = std::min(high, h.length + room.depth[n]);
    int64_t begin = oldest;
    if (h.window > 0) begin = std::max(begin, h.length + room.depth[n] - h.window);
    Sum* s = scores + q * stride;
    for (int64_t p = std::max(low, h.length); p < end; p++)
      s[p - low] = branch[q * padded + room.path[n * h.M + p - h.length]];
    const Sum top = begin < end ? highest<T>(s, begin - low, end - low) : -std::numeric_limits<Sum>::infinity();
    tops[q] = top;
    totals[q] = begin < end ? soften<T>(s, begin - low, end - low, top) : Sum(0);
    // positions outside weigh nothing
    if (begin >= end) std::fill_n(s, std::max<int64_t>(0, committed - low), Sum(0));
    else std::fill_n(s + (oldest - low), std::max<int64_t>(0, begin - oldest), Sum(0));
  }
  if (committed > oldest)
    mix<T>([&](int64_t p) { return h.value(p); }, oldest, committed, scores + (oldest - low), stride, sums, h.E, Q,
           std::make_integer_sequence<int, MIXED>{});
  for (int64_t q = 0; branches && q < Q; q++) {
    const int64_t n = q / h.G, begin = std::max(low, h.length), end = std::min(high, h.length + room.depth[n]);
    const auto node = [&](int64_t p) { return h.value(h.length + room.path[n * h.M + p - h.length]); };
    mix_few<T, 1>(node, begin, end, scores + q * stride + (begin - low), stride, sums + q * h.E, h.E);
  }
}

template <class T>
void attend_all(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& plan, double scale,
                double cap, const T* sinks, Tensor& out) {
  using Sum = typename Kind<T>::Sum;
  const int64_t B = query.size(0), H = query.size(1), N = query.size(2), heads = keys.size(1);
  const int64_t G = H / heads, Q = N * G, E = values.size(3), M = plan.size(3) - 2, row = N * (2 + M);
  const int64_t* plans = plan.const_data_ptr<int64_t>();
  int64_t longest = 0;
  for (int64_t b = 0; b < B; b++) longest = std::max(longest, plans[b * row]);
  const int64_t chunks = (longest + M + CHUNK - 1) / CHUNK, piece = Q * (E + 2);
  static thread_local std::vector<Sum> store;
  if (store.size() < size_t(B * heads * chunks * piece)) store.resize(B * heads * chunks * piece);
  Sum* pieces = store.data();

  const auto piece_of = [&](int64_t item) {
    const int64_t b = item / (heads * chunks), k = item / chunks % heads;
    return Head<T>{query.const_data_ptr<T>() + b * query.stride(0) + k * G * query.stride(1),
                   keys.const_data_ptr<T>() + b * keys.stride(0) + k * keys.stride(1),
                   values.const_data_ptr<T>() + b * values.stride(0) + k * values.stride(1),
                   query.stride(2), query.stride(1), keys.stride(2), values.stride(2),
                   N, M, G, query.size(3), E, keys.size(2),
                   plans[b * row], plans[b * row + 1], plans + b * row,
                   Sum(scale), Sum(cap), item % chunks * CHUNK};
  };

  at::parallel_for(0, B * heads * chunks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Room room;
    for (int64_t item = begin; item < end; item++) {
      Sum *sums = pieces + item * piece, *tops = sums + Q * E, *totals = tops + Q;
      const Head<T> h = piece_of(item), next = piece_of(std::min(item + 1, end - 1));
      if (h.low < h.length + M) attend_chunk(h, item + 1 < end ? &next : nullptr, room, sums, tops, totals);
      else std::fill_n(totals, Q, Sum(0));
    }
  });

  T* result = out.data_ptr<T>();  // [B, N, H, E]
  at::parallel_for(0, B * heads * Q, std::max<int64_t>(1, 32768 / (E * chunks)), [&](int64_t begin, int64_t end) {
    std::vector<Sum> mixed(E);
    for (int64_t item = begin; item < end; item++) {
      const int64_t bk = item / Q, q = item % Q, b = bk / heads, head = bk % heads * G + q % G;
      const Sum* first = pieces + bk * chunks * piece;
      Sum top = sinks ? Sum(sinks[head]) : -std::numeric_limits<Sum>::infinity(), total = 0;
      for (int64_t c = 0; c < chunks; c++)
        if (first[c * piece + Q * E + Q + q] > 0) top = std::max(top, first[c * piece + Q * E + q]);
      if (sinks) total = std::exp(Sum(sinks[head]) - top);
      std::fill(mixed.begin(), mixed.end(), Sum(0));
      for (int64_t c = 0; c < chunks; c++) {
        const Sum* from = first + c * piece;
        if (!(from[Q * E + Q + q] > 0)) continue;
        const Sum weight = std::exp(from[Q * E + q] - top);
        total += weight * from[Q * E + Q + q];
        for (int64_t e = 0; e < E; e++) mixed[e] += weight * from[q * E + e];
      }
      T* to = result + ((b * N + q / G) * H + head) * E;
      for (int64_t e = 0; e < E; e++) mixed[e] /= total;
      give<T>(mixed.data(), nullptr, E, to);
    }
  });
}

// -------------------------------------------------------------------------------------------------------- emission

// `noise.Noise.bits` of one position, for the target's own stream.
struct Stream {
  std::uint32_t high, low;

  Stream(int64_t key, int64_t position) {
    auto x = std::uint64_t(key) ^ (std::uint64_t(position) << 2) * 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 32) * 0xD6E8FEB86659FD93ull;
    x = (x ^ x >> 32) * 0xD6E8FEB86659FD93ull;
    high = std::uint32_t(x >> 32);
    low = std::uint32_t(x);
  }

  template <class W>
  W bits(W token) const {
    W x = token * 0x2545F491u + 0x6A09E667u;
    x ^= x >> 16;
    x = (x ^ high) * 0x9E3779B1u;
    x ^= x >> 16;
    x = (x ^ low) * 0x85EBCA6Bu;
    x ^= x >> 15;
    x *= 0xC2B2AE35u;
    return (x ^ x >> 16) & 0x7fffffffu;
  }
};

// The natural logarithm of positive numbers to 1e-5.
inline Floats rough_log(Floats x) {
  const Words bits = (Words)x;
  const Floats e = __builtin_convertvector((Ints)(bits >> 23) - 127, Floats);
  const Floats m = (Floats)((bits & 0x7fffffu) | 0x3f800000u) - 1.0f;  // in [0, 1)
  // log(1 + m), fitted at Chebyshev's points
  Floats p = Floats{} + 0.0100092896f;
  p = p * m - 0.0524375371f;
  p = p * m + 0.130833428f;
  p = p * m - 0.223165864f;
  p = p * m + 0.327225715f;
  p = p * m - 0.499285049f;
  p = p * m + 0.999967081f;
  p = p * m + 2.55467302e-07f;
  return p + e * 0.69314718f;
}

// values[v ..] as floats; lowest where there are none.
template <class T>
inline Floats sixteen(const T* values, int64_t left) {
  Floats x;
  if (left >= 16) {
    if constexpr (Kind<T>::lanes == 16) return Kind<T>::values(values);
  }
  for (int i = 0; i < 16; i++) x[i] = i < left ? float(values[i]) : -std::numeric_limits<float>::infinity();
  return x;
}

inline float largest(Floats x) {
  float top = x[0];
  for (int i = 1; i < 16; i++) top = std::max(top, x[i]);
  return top;
}

// The token of the largest value, the first of several.
template <class T>
int64_t top_of(const T* values, int64_t V) {
  Floats peak = Floats{} - std::numeric_limits<float>::infinity();
  for (int64_t v = 0; v < V; v += 16) {
    const Floats x = sixteen(values + v, V - v);
    peak = x > peak ? x : peak;
  }
  const float near = largest(peak);
  int64_t top = -1;
  for (int64_t v = 0; v < V; v++)
    if (float(values[v]) >= near && (top < 0 || values[v] > values[top])) top = v;
  return std::max<int64_t>(top, 0);
}

// The token of largest values + temperature * Gumbel noise: roughly for all, exactly for those that come near.
template <class T>
int64_t winner(const T* values, int64_t V, float temperature, int64_t key, int64_t position,
               std::vector<float>& rough) {
  using Sum = typename Kind<T>::Sum;
  if (!(temperature > 0)) return top_of(values, V);
  const Stream stream(key, position);
  rough.resize((V + 15) / 16 * 16);
  Words lane;
  for (int i = 0; i < 16; i++) lane[i] = i;
  Floats peak = Floats{} - std::numeric_limits<float>::infinity();
  for (int64_t v = 0; v < V; v += 16) {
    const Floats u = __builtin_convertvector((Ints)stream.bits(lane + std::uint32_t(v)), Floats) * 0x1p-31f + 0x1p-32f;
    const Floats small = u * (1.0f + u * (0.5f + u * 0.33333333f));
    const Floats exponential = u < 0.015625f ? small : -rough_log(1.0f - u + 0x1p-25f);
    const Floats score = sixteen(values + v, V - v) - temperature * rough_log(exponential);
    std::memcpy(rough.data() + v, &score, 64);
    peak = score > peak ? score : peak;
  }
  const float near = largest(peak) - 0.02f * temperature - 1e-4f;
  int64_t top = 0;
  Sum best = -std::numeric_limits<Sum>::infinity();
  for (int64_t v = 0; v < V; v++) {
    if (rough[v] < near) continue;
    const float uniform = float(stream.bits(std::uint32_t(v))) * float(-0x1p-31 * (1 - 0x1p-23)) - 0x1p-32f;
    const float noise = std::log(-std::log1p(uniform));
    const Sum score = Sum(values[v]) - Sum(temperature) * Sum(noise);
    if (score > best) {
      best = score;
      top = v;
    }
  }
  return top;
}

// ------------------------------------------------------------------------------------------------------- operators

template <class Work>
void by_type(const Tensor& x, Work&& work) {
  switch (x.scalar_type()) {
    case at::kFloat: return work(float{});
    case at::kDouble: return work(double{});
    case at::kBFloat16: return work(c10::BFloat16{});
    default: TORCH_CHECK(false, "foretoken's kernels take float32, float64 and bfloat16, not ", x.scalar_type());
  }
}

// So many values of x's type that nobody wrote, in pages of 2 MiB where the system has them: whoever reads them one
// after the other waits for no table of pages.
Tensor room(const Tensor& x, int64_t values) {
  constexpr size_t PAGE = size_t(2) << 20;
  const size_t bytes = (size_t(values) * x.element_size() + PAGE - 1) / PAGE * PAGE;
  void* begin = std::aligned_alloc(PAGE, bytes);
  TORCH_CHECK(begin || !bytes, "no memory for ", bytes, " bytes");
#if defined(MADV_HUGEPAGE)
  madvise(begin, bytes, MADV_HUGEPAGE);
#endif
  return at::from_blob(begin, {values}, [](void* p) { std::free(p); }, x.options());
}

// [ceil(N / block), ceil(K / pair), block, pair] of a weight [N, K], zeros where there is none.
Tensor pack(const Tensor& weight) {
  const Tensor w = weight.contiguous();
  Tensor out;
  by_type(w, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t P = Kind<T>::pair, BLOCK = block_of<T>();
    const int64_t N = w.size(0), K = w.size(1), cells = (K + P - 1) / P, blocks = (N + BLOCK - 1) / BLOCK;
    out = at::empty({blocks, cells, BLOCK, P}, w.options());
    const T* from = w.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++)
        for (int64_t n = 0; n < BLOCK; n++)
          for (int64_t k = 0; k < cells * P; k++) {
            const int64_t row = block * BLOCK + n;
            to[((block * cells + k / P) * BLOCK + n) * P + k % P] = row < N && k < K ? from[row * K + k] : T(0);
          }
    });
  });
  return out;
}

// [..., outputs] of x [..., K] and a packed weight.
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
  const Tensor rows = x.reshape({-1, x.size(-1)}).contiguous();
  Tensor y = at::empty({rows.size(0), outputs}, x.options());
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    TORCH_CHECK(packed.scalar_type() == x.scalar_type() && packed.size(1) * packed.size(3) >= x.size(-1) &&
                packed.size(0) * packed.size(2) >= outputs, "a weight packed for other inputs");
    multiply<T>(rows, packed, bias ? bias->const_data_ptr<T>() : nullptr, y);
  });
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  return y.view(shape);
}

// A copy: what is fused around it is computed before it and not again behind it.
Tensor keep(const Tensor& x) { return x.clone(); }

// Put new keys [B, K, N, D] and values [B, K, N, E] into the slots [B, N] of a layer's [B, K, S, D] and [B, K, S, E].
void write(Tensor& keys, Tensor& values, const Tensor& new_keys, const Tensor& new_values, const Tensor& slot) {
  const int64_t B = slot.size(0), N = slot.size(1), heads = keys.size(1);
  const Tensor slots = slot.contiguous();
  const auto copy = [&](Tensor& store, const Tensor& fresh) {
    TORCH_CHECK(store.stride(3) == 1 && fresh.stride(3) == 1 && store.scalar_type() == fresh.scalar_type() &&
                store.size(3) == fresh.size(3), "keys and values unlike those of the cache");
    const int64_t bytes = fresh.element_size(), size = fresh.size(3) * bytes;
    char* to = static_cast<char*>(store.mutable_data_ptr());
    const char* from = static_cast<const char*>(fresh.const_data_ptr());
    const int64_t* at = slots.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < heads; k++)
        for (int64_t n = 0; n < N; n++) {
          const int64_t row = at[b * N + n];
          TORCH_CHECK(0 <= row && row < store.size(2), "slot ", row, " of ", store.size(2));
          std::memcpy(to + (b * store.stride(0) + k * store.stride(1) + row * store.stride(2)) * bytes,
                      from + (b * fresh.stride(0) + k * fresh.stride(1) + n * fresh.stride(2)) * bytes, size);
        }
  };
  copy(keys, new_keys);
  copy(values, new_values);
}

// [B, N, H, E] attention of query [B, H, N, D] to keys [B, K, S, D] and values [B, K, S, E] by a plan
// [B, 1, N, 2 + M] int64: committed tokens, window (0: none), and whether a query sees each of M nodes behind them.
Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& plan, double scale,
              double cap, const std::optional<Tensor>& sinks) {
  Tensor out = at::empty({query.size(0), query.size(2), query.size(1), values.size(3)}, query.options());
  const Tensor plans = plan.contiguous();
  TORCH_CHECK(query.stride(3) == 1 && keys.stride(3) == 1 && values.stride(3) == 1, "values must lie together");
  by_type(query, [&](auto zero) {
    using T = decltype(zero);
    attend_all<T>(query, keys, values, plans, scale, cap, sinks ? sinks->const_data_ptr<T>() : nullptr, out);
  });
  return out;
}

// [B, N] what is emitted at `position` [B, N] under values [B, N, V], temperature [B] float32 and noise of `key` [B].
Tensor race(const Tensor& values, const Tensor& temperature, const Tensor& key, const Tensor& position) {
  const int64_t B = values.size(0), N = values.size(1), V = values.size(2);
  const Tensor v = values.contiguous(), p = position.contiguous(), t = temperature.contiguous();
  const Tensor k = key.contiguous();
  Tensor out = at::empty({B, N}, position.options());
  int64_t* to = out.data_ptr<int64_t>();
  by_type(v, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, B * N, 1, [&](int64_t begin, int64_t end) {
      static thread_local std::vector<float> rough;
      for (int64_t i = begin; i < end; i++)
        to[i] = winner(v.const_data_ptr<T>() + i * V, V, t.const_data_ptr<float>()[i / N],
                       k.const_data_ptr<int64_t>()[i / N], p.const_data_ptr<int64_t>()[i], rough);
    });
  });
  return out;
}

// Move the nodes of `path` [B, N], `count` [B] of them, to the first slots behind the `length` [B] committed ones of
// every store [B, K, S, D]. A path rises, so no node is overwritten before it has moved.
void move(at::TensorList stores, const Tensor& path, const Tensor& length, const Tensor& count) {
  const int64_t B = path.size(0), N = path.size(1);
  const Tensor paths = path.contiguous(), before = length.contiguous(), number = count.contiguous();
  const int64_t *nodes = paths.const_data_ptr<int64_t>(), *lengths = before.const_data_ptr<int64_t>();
  const int64_t* counts = number.const_data_ptr<int64_t>();
  for (const Tensor& store : stores) {
    const int64_t S = store.size(2), bytes = store.element_size(), size = store.size(3) * bytes;
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < store.size(1); k++) {
        char* rows = static_cast<char*>(store.mutable_data_ptr()) + (b * store.stride(0) + k * store.stride(1)) * bytes;
        const int64_t step = store.stride(2) * bytes;
        for (int64_t i = 0; i < counts[b]; i++)
          if (const int64_t node = nodes[b * N + i]; node != i)
            std::memcpy(rows + (lengths[b] + i) % S * step, rows + (lengths[b] + node) % S * step, size);
      }
  }
}

TORCH_LIBRARY_FRAGMENT(foretoken, m) {
  const auto define = [&](const std::string& name, const std::string& signature) {
    // where there is a GPU, `operators.py` may have said so before
    if (!c10::Dispatcher::singleton().findSchema({"foretoken::" + name, ""})) m.def((name + signature).c_str());
  };
  define("room", "(Tensor x, int values) -> Tensor");
  define("pack", "(Tensor weight) -> Tensor");
  define("linear", "(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor");
  define("keep", "(Tensor x) -> Tensor");
  define("write", "(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor slot) -> ()");
  define("attend", "(Tensor query, Tensor keys, Tensor values, Tensor plan, float scale, float cap, Tensor? sinks)"
                   " -> Tensor");
  define("race", "(Tensor values, Tensor temperature, Tensor key, Tensor position) -> Tensor");
  define("move", "(Tensor(a!)[] stores, Tensor path, Tensor length, Tensor count) -> ()");
}

TORCH_LIBRARY_IMPL(foretoken, CPU, m) {
  m.impl("room", room);
  m.impl("pack", pack);
  m.impl("linear", linear);
  m.impl("keep", keep);
  m.impl("write", write);
  m.impl("race", race);
  m.impl("move", move);
  m.impl("attend", attend);
}

}  // namespace

// What compiled programs call, without a look-up by name and a list of arguments (`kernels.shims` declares them).
using torch::aot_inductor::new_tensor_handle;

static at::Tensor& held(AtenTensorHandle handle) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
}

static std::optional<at::Tensor> maybe(const AtenTensorHandle* handle) {
  return handle ? std::make_optional(held(*handle)) : std::nullopt;
}

extern "C" {

AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle packed, const AtenTensorHandle* bias,
                                     int64_t outputs, AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *out = new_tensor_handle(linear(held(x), held(packed), maybe(bias), outputs)); });
}

AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values,
                                     AtenTensorHandle plan, double scale, double cap, const AtenTensorHandle* sinks,
                                     AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *out = new_tensor_handle(attend(held(query), held(keys), held(values), held(plan), scale, cap, maybe(sinks)));
  });
}

AOTITorchError aoti_torch_cpu_write(AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle new_keys,
                                    AtenTensorHandle new_values, AtenTensorHandle slot, AtenTensorHandle*) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { write(held(keys), held(values), held(new_keys), held(new_values), held(slot)); });
}

AOTITorchError aoti_torch_cpu_race(AtenTensorHandle values, AtenTensorHandle temperature, AtenTensorHandle key,
                                   AtenTensorHandle position, AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *out = new_tensor_handle(race(held(values), held(temperature), held(key), held(position))); });
}

AOTITorchError aoti_torch_cpu_keep(AtenTensorHandle x, AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ *out = new_tensor_handle(keep(held(x))); });
}

}  // extern "C"
