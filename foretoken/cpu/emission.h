// The token that the target emits under keyed noise.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "crew.h"
#include "vectors.h"

namespace {

constexpr int64_t PIECE = 4096;  // tokens whose scores are one piece of work

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

inline bool any(Ints lanes) {
  int64_t words[8];
  std::memcpy(words, &lanes, 64);
  return (words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7]) != 0;
}

// One position: the token of the largest value + temperature * Gumbel noise, the first of several. Scores are computed
// roughly for all tokens, exactly for those that come near.
template <class T>
struct Race {
  using Sum = typename Kind<T>::Sum;
  const T* values;
  int64_t V;
  float temperature;
  Stream stream;
  float *rough, *peaks;  // of every token, if there is noise; of every piece

  // Room for so many numbers in `rough`.
  static int64_t room(int64_t V) { return (V + 15) / 16 * 16; }
  static int64_t pieces(int64_t V) { return (V + PIECE - 1) / PIECE; }

  // The scores of a piece of the tokens, and its peak.
  void survey(int64_t piece) const {
    Floats peak = Floats{} - std::numeric_limits<float>::infinity();
    for (int64_t v = piece * PIECE; v < std::min(V, (piece + 1) * PIECE); v += 16) {
      Floats score = sixteen(values + v, V - v);
      if (temperature > 0) {
        score -= temperature * noise(v);
        std::memcpy(rough + v, &score, 64);
      }
      peak = score > peak ? score : peak;
    }
    peaks[piece] = largest(peak);
  }

  int64_t winner() const {
    const float near = *std::max_element(peaks, peaks + pieces(V)) - (temperature > 0 ? 0.02f * temperature + 1e-4f : 0);
    int64_t top = 0;
    Sum best = -std::numeric_limits<Sum>::infinity();
    for (int64_t v = 0; v < V; v += 16) {
      if (v % PIECE == 0 && peaks[v / PIECE] < near) {
        v += PIECE - 16;
        continue;
      }
      const Floats about = temperature > 0 ? load<Floats>(rough + v) : sixteen(values + v, V - v);
      if (!any(about >= near)) continue;
      for (int64_t token = v; token < std::min(V, v + 16); token++)
        if (about[token - v] >= near)
          if (const Sum score = exactly(token); score > best) best = score, top = token;
    }
    return top;
  }

 private:
  // log of the exponential noise of 16 tokens from v on, to 0.01.
  Floats noise(int64_t v) const {
    Words lane;
    for (int i = 0; i < 16; i++) lane[i] = i;
    const Floats u = __builtin_convertvector((Ints)stream.bits(lane + std::uint32_t(v)), Floats) * 0x1p-31f + 0x1p-32f;
    const Floats small = u * (1.0f + u * (0.5f + u * 0.33333333f));
    return rough_log(u < 0.015625f ? small : -rough_log(1.0f - u + 0x1p-25f));
  }

  Sum exactly(int64_t token) const {
    if (!(temperature > 0)) return Sum(values[token]);
    const float uniform = float(stream.bits(std::uint32_t(token))) * float(-0x1p-31 * (1 - 0x1p-23)) - 0x1p-32f;
    const float noise = std::log(-std::log1p(uniform));
    return Sum(values[token]) - Sum(temperature) * Sum(noise);
  }
};

// The winners of `count` positions; race(i) is the i-th.
template <class T, class Make>
void race_all(int64_t count, int64_t V, const Make& make, int64_t* winners) {
  const int64_t pieces = Race<T>::pieces(V), room = Race<T>::room(V);
  static thread_local std::vector<float> store;
  if (int64_t(store.size()) < count * (room + pieces)) store.resize(count * (room + pieces));
  float *rough = store.data(), *peaks = rough + count * room;
  const auto race = [&](int64_t i) { return make(i, rough + i * room, peaks + i * pieces); };
  share(count * pieces, [&](Items items) {
    for (int64_t i; (i = items.next()) >= 0;) race(i / pieces).survey(i % pieces);
  });
  share(count, [&](Items items) {
    for (int64_t i; (i = items.next()) >= 0;) winners[i] = race(i).winner();
  });
}

}  // namespace
