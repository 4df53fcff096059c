// Few queries against a cache of slots, by position.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>
#include <vector>

#include "crew.h"
#include "rows.h"

namespace {

using at::Tensor;

// Queries whose accumulators fit in registers: times a tree of partial sums of scores, times four vectors of values.
#if defined(__AVX512F__)
constexpr int TURNED = 4, MIXED = 6;
#else
constexpr int TURNED = 1, MIXED = 4;
#endif
constexpr int64_t CHUNK = 1024;  // positions whose attention is one piece of work
constexpr int64_t AHEAD = 64;    // positions whose keys are fetched before they are used
constexpr int64_t SOON = 32;     // positions whose values are

// Rows of a cache that lie one behind the other.
template <class T>
struct Lines {
  const T* first;
  int64_t stride;
  const T* operator()(int64_t i) const { return first + i * stride; }
};

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
      Vec sums[L];
      switch (vectors) {
        case 2: products<2>(rows + q * size, lines, sums); break;
        case 4: products<4>(rows + q * size, lines, sums); break;
        default: products<0>(rows + q * size, lines, sums);
      }
      put(totals_of<typename Squares<T>::Index>(sums), out + q * stride);
    }
  }

  // The products of a query and L keys, lane by lane, a key at a time: memory is read as it lies. COUNT: the vectors of
  // each, if that is known.
  template <int COUNT>
  inline __attribute__((always_inline)) void products(const T* query, const T* const (&lines)[L], Vec (&sums)[L]) const {
    const int64_t count = COUNT ? COUNT : vectors;
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) {
      sums[i] = Vec{};
#pragma GCC unroll 4
      for (int64_t c = 0; c < count; c++)
        sums[i] = K::mac(sums[i], K::cells(lines[i] + c * VALUES), K::cells(query + c * VALUES));
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
    if (WHOLE) fetch<NEAREST>(row(p + SOON), WIDE * L);
    else std::copy_n(row(p), count, part);
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

// Scores of the chunk's committed positions; brings keys nearer, at last those of the next piece.
template <class T>
void score_committed(const Head<T>& h, const Head<T>* next, Queries<T>& queries, typename Kind<T>::Sum* scores,
                     int64_t stride) {
  using Sum = typename Kind<T>::Sum;
  constexpr int64_t L = Kind<T>::lanes;
  const int64_t committed = h.committed();
  for (int64_t p = h.oldest(); p < committed; p += L) {
    const int64_t ahead = p + AHEAD;
    if (ahead < committed) fetch<NEAREST>(h.key(ahead), L * h.key_stride);
    else if (next) fetch<NEAREST>(next->key(next->oldest() + ahead - committed), L * h.key_stride);
    Sum* out = scores + (p - h.low);
    if (p + L <= committed && h.slot(p) + L <= h.S) queries.score(Lines<T>{h.key(p), h.key_stride}, out, stride);
    else queries.score([&](int64_t i) { return h.key(std::min(p + i, committed - 1)); }, out, stride);
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
  for (int64_t p = oldest, end; p < committed; p = end) {  // as far as values lie one behind the other
    end = std::min(committed, p + h.S - h.slot(p));
    mix<T>(Lines<T>{h.value(p), h.value_stride}, 0, end - p, scores + (p - low), stride, sums, h.E, Q,
           std::make_integer_sequence<int, MIXED>{});
  }
  for (int64_t q = 0; branches && q < Q; q++) {
    const int64_t n = q / h.G, begin = std::max(low, h.length), end = std::min(high, h.length + room.depth[n]);
    const auto node = [&](int64_t p) {  // also asked for what lies behind the end, to be fetched
      return h.value(h.length + room.path[n * h.M + std::min(p, end - 1) - h.length]);
    };
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

  const int64_t items = B * heads * chunks;
  share(items, [&](Items mine) {
    static thread_local Room room;
    for (int64_t item; (item = mine.next()) >= 0;) {
      Sum *sums = pieces + item * piece, *tops = sums + Q * E, *totals = tops + Q;
      const Head<T> h = piece_of(item), next = piece_of(std::min(item + 1, items - 1));
      if (h.low < h.length + M) attend_chunk(h, item + 1 < items ? &next : nullptr, room, sums, tops, totals);
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

}  // namespace
