// The kernels of the vector tiers, written once over a Simd type.
//
// Include only from a tier's own file. Everything is a template over the tier's Simd type, so that
// code compiled with one tier's flags never stands in for another's; for the same reason no
// standard-library function that might not be inlined is called here.
#pragma once

#include <type_traits>
#include <utility>

#include "kernels.h"
#include "prefetch.h"

namespace longreach {
namespace vector {

// After the parameters of a lambda that holds part of an inner loop: it is inlined before the
// compiler decides which variables live in registers.
#define LONGREACH_INLINE __attribute__((always_inline))

template <int Number>
struct Constant {
  static constexpr int kValue = Number;
  constexpr operator int() const { return Number; }
};

template <class Body, int... Numbers>
inline LONGREACH_INLINE void unrolled_over(std::integer_sequence<int, Numbers...>, Body body) {
  (body(Constant<Numbers>()), ...);
}

// body(0) ... body(Count - 1), each with a number known to the compiler. GCC unrolls plain loops
// after it has decided what lives in registers: arrays of sums indexed in them stay in memory.
template <int Count, class Body>
inline LONGREACH_INLINE void unrolled(Body body) {
  unrolled_over(std::make_integer_sequence<int, Count>(), body);
}

// Rows ahead to prefetch: contiguous rows (the hardware prefetcher helps), gathered rows.
constexpr int64_t kStreamAhead = 16;
constexpr int64_t kGatherAhead = 16;

template <class S>
inline int64_t row_index(const RowChoice& choice, int64_t i) {
  return choice.ids ? choice.ids[i] : choice.first + i;
}

template <class S, class T>
inline void prefetch_row(const Rows& rows, int64_t index) {
  const char* p = reinterpret_cast<const char*>(rows.row<T>(index));
  for (int at = 0; at < rows.dim * static_cast<int>(sizeof(T)); at += 64) prefetch(p + at);
}

// Prefetches the key that will be scored a little after key i.
template <class S, class T>
inline void prefetch_ahead(const Rows& rows, const RowChoice& choice, int64_t i) {
  if (!choice.ids)
    prefetch_row<S, T>(rows, choice.first + i + kStreamAhead);
  else if (i + kGatherAhead < choice.count)
    prefetch_row<S, T>(rows, choice.ids[i + kGatherAhead]);
}

// Prefetches elements [from, from + count) of a row that comes after this choice, with row i, into
// the second-level cache.
template <class S, class T>
inline void prefetch_upcoming(const RowChoice& choice, int64_t i, int from, int count) {
  if (!choice.upcoming) return;
  const T* row = choice.upcoming->row<T>(choice.upcoming_first + i);
  for (int at = from; at < from + count; at += 64 / static_cast<int>(sizeof(T)))
    prefetch_second(row + at);
}

template <class S, class T>
inline void prefetch_first(const Rows& rows, const RowChoice& choice, int64_t count) {
  if (!choice.ids) return;
  for (int64_t i = 0; i < choice.count && i < count; ++i) prefetch_row<S, T>(rows, choice.ids[i]);
}

// ---- scores -------------------------------------------------------------------------------------

// Scores of `Keys` keys together: each loaded piece of the queries serves them all, and there are
// more sums under way than an FMA takes cycles.
template <class S, class T, int Keys>
inline void score_keys(const T* const* keys, int dim, const QueryTile& queries, float* scores) {
  typename S::F sums[Keys][kTile];
  unrolled<Keys>([&](auto i) LONGREACH_INLINE {
    unrolled<kTile>([&](auto r) LONGREACH_INLINE { sums[i][r] = S::zero(); });
  });
  const auto add = [&](int c, const typename S::F* pieces) LONGREACH_INLINE {
    unrolled<kTile>([&](auto r) LONGREACH_INLINE {
      const auto query = S::in_register(S::load(queries.wide + r * queries.stride + c));
      unrolled<Keys>([&](auto i)
                         LONGREACH_INLINE { sums[i][r] = S::fma(query, pieces[i], sums[i][r]); });
    });
  };
  typename S::F pieces[Keys];
  int c = 0;
  for (; c + S::kWidth <= dim; c += S::kWidth) {
    unrolled<Keys>([&](auto i) LONGREACH_INLINE { pieces[i] = S::load(keys[i] + c); });
    add(c, pieces);
  }
  if (c < dim) {  // the tile is zero-padded, so whole vectors of it may be read
    unrolled<Keys>([&](auto i)
                       LONGREACH_INLINE { pieces[i] = S::load_part(keys[i] + c, dim - c); });
    add(c, pieces);
  }
  unrolled<Keys>([&](auto i) LONGREACH_INLINE {
    S::sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3], scores + i * kTile);
  });
}

template <class S, class T>
void score_typed(const Rows& keys, const RowChoice& choice, const QueryTile& queries,
                 float* scores) {
  constexpr int kKeys = S::kScoreKeys;
  prefetch_first<S, T>(keys, choice, kGatherAhead);
  int64_t i = 0;
  for (; i + kKeys <= choice.count; i += kKeys) {
    const T* rows[kKeys];
    unrolled<kKeys>([&](auto j) LONGREACH_INLINE {
      prefetch_ahead<S, T>(keys, choice, i + j);
      prefetch_upcoming<S, T>(choice, i + j, 0, keys.dim);
      rows[j] = keys.row<T>(row_index<S>(choice, i + j));
    });
    score_keys<S, T, kKeys>(rows, keys.dim, queries, scores + i * kTile);
  }
  for (; i < choice.count; ++i) {
    const T* row = keys.row<T>(row_index<S>(choice, i));
    score_keys<S, T, 1>(&row, keys.dim, queries, scores + i * kTile);
  }
}

template <class S>
void score(const Rows& keys, const RowChoice& choice, const QueryTile& queries, float* scores) {
  switch (keys.type) {
    case Storage::kFloat32:
      return score_typed<S, float>(keys, choice, queries, scores);
    case Storage::kFloat16:
      return score_typed<S, Half>(keys, choice, queries, scores);
    case Storage::kBfloat16:
      return score_typed<S, Bfloat16>(keys, choice, queries, scores);
  }
}

// `Keys` keys against a panel: an outer product per element of the head.
template <class S, int Keys>
inline void score_panel_block(const float* keys, int dim, const float* panel, float* scores) {
  constexpr int kVectors = kPanel / S::kWidth;
  typename S::F sums[Keys][kVectors];
  const auto each = [](auto body) LONGREACH_INLINE {
    unrolled<Keys>([&](auto i) LONGREACH_INLINE {
      unrolled<kVectors>([&](auto v) LONGREACH_INLINE { body(i, v); });
    });
  };
  each([&](auto i, auto v) LONGREACH_INLINE { sums[i][v] = S::zero(); });
  for (int c = 0; c < dim; ++c) {
    typename S::F queries[kVectors];
    unrolled<kVectors>(
        [&](auto v) LONGREACH_INLINE { queries[v] = S::load(panel + c * kPanel + v * S::kWidth); });
    unrolled<Keys>([&](auto i) LONGREACH_INLINE {
      const auto x = S::all(keys[i * dim + c]);
      unrolled<kVectors>([&](auto v)
                             LONGREACH_INLINE { sums[i][v] = S::fma(x, queries[v], sums[i][v]); });
    });
  }
  each([&](auto i, auto v)
           LONGREACH_INLINE { S::store(scores + i * kPanel + v * S::kWidth, sums[i][v]); });
}

template <class S>
void score_panel(const float* keys, int64_t count, int dim, const float* panel, float* scores) {
  int64_t i = 0;
  for (; i + S::kPanelKeys <= count; i += S::kPanelKeys)
    score_panel_block<S, S::kPanelKeys>(keys + i * dim, dim, panel, scores + i * kPanel);
  for (; i < count; ++i) score_panel_block<S, 1>(keys + i * dim, dim, panel, scores + i * kPanel);
}

// ---- softmax ------------------------------------------------------------------------------------

// exp(x) to 2e-7 relative for x <= 88; exactly 0 below -87. NaN stays NaN.
template <class S>
inline typename S::F exponential(typename S::F x) {
  using F = typename S::F;
  const F lowest = S::all(-87.0f);
  const F bounded = S::max(lowest, x);
  const F n = S::round(S::mul(bounded, S::all(1.44269504088896341f)));
  F f = S::negated_fma(n, S::all(0.693359375f), bounded);  // ln 2 in two parts
  f = S::negated_fma(n, S::all(-2.12194440e-4f), f);
  F p = S::all(1.9875691500e-4f);  // Cephes expf
  p = S::fma(p, f, S::all(1.3981999507e-3f));
  p = S::fma(p, f, S::all(8.3334519073e-3f));
  p = S::fma(p, f, S::all(4.1665795894e-2f));
  p = S::fma(p, f, S::all(1.6666665459e-1f));
  p = S::fma(p, f, S::all(5.0000001201e-1f));
  p = S::fma(S::mul(f, f), p, S::add(f, S::all(1.0f)));
  return S::zero_below(S::scale2(p, n), x, lowest);
}

// 2^x to 8e-5 relative for x <= 127, and next to nothing below -126: for sums of estimates.
template <class S>
inline typename S::F rough_exp2(typename S::F x) {
  using F = typename S::F;
  const F bounded = S::max(x, S::all(-126.0f));
  const F n = S::round(bounded);
  const F f = S::sub(bounded, n);
  F p = S::all(5.517163e-2f);  // minimax over [-1/2, 1/2]
  p = S::fma(p, f, S::all(2.4261114e-1f));
  p = S::fma(p, f, S::all(6.9326100e-1f));
  p = S::fma(p, f, S::all(9.9992807e-1f));
  return S::add_exponent(p, n);
}

// softcap * tanh(x / softcap), through exp(2x) of the bounded argument.
template <class S>
inline typename S::F capped(typename S::F x, float softcap) {
  using F = typename S::F;
  const F one = S::all(1.0f);
  F t = S::mul(x, S::all(2.0f / softcap));
  t = S::max(S::all(-40.0f), S::min(S::all(40.0f), t));
  const F e = exponential<S>(t);
  return S::mul(S::all(softcap), S::div(S::sub(e, one), S::add(e, one)));
}

template <class S>
void to_logits(float* scores, int64_t count, const LogitRule& rule) {
  const auto scale = S::all(rule.scale);
  for (int64_t i = 0; i < count; i += S::kWidth) {
    const bool whole = i + S::kWidth <= count;
    const int left = static_cast<int>(count - i);
    auto x = S::mul(whole ? S::load(scores + i) : S::load_part(scores + i, left), scale);
    if (rule.softcap > 0) x = capped<S>(x, rule.softcap);
    if (whole)
      S::store(scores + i, x);
    else
      S::store_part(scores + i, x, left);
  }
}

// Vectors hold the lanes over and over, so a lane's sum lies kWidth / lanes places apart, or the
// lanes need several vectors. Folds `vectors` into `out[lanes]` with `combine`.
template <class S, class Combine>
inline void fold_lanes(const typename S::F* vectors, int count, int lanes, float* out,
                       Combine combine) {
  float places[kPanel * 2];
  for (int v = 0; v < count; ++v) S::store(places + v * S::kWidth, vectors[v]);
  for (int i = 0; i < count * S::kWidth; ++i) out[i % lanes] = combine(out[i % lanes], places[i]);
}

template <class S, int Lanes>
void softmax_step_lanes(float* logits, int64_t count, float* highest, float* total,
                        float* rescale) {
  using F = typename S::F;
  constexpr int kVectors = Lanes > S::kWidth ? Lanes / S::kWidth : 1;
  constexpr int kStep = kVectors * S::kWidth;
  const float infinity = __builtin_inff();
  const int64_t used = count * Lanes;
  const int64_t padded = (used + kStep - 1) / kStep * kStep;
  for (int64_t i = used; i < padded; ++i) logits[i] = -infinity;

  F tops[kVectors];
  for (int v = 0; v < kVectors; ++v) tops[v] = S::all(-infinity);
  for (int64_t i = 0; i < padded; i += kStep)
    for (int v = 0; v < kVectors; ++v)
      tops[v] = S::max(S::load(logits + i + v * S::kWidth), tops[v]);
  float top[Lanes], shift[kStep], sums[Lanes];
  for (int r = 0; r < Lanes; ++r) top[r] = highest[r];
  fold_lanes<S>(tops, kVectors, Lanes, top, [](float a, float b) { return a > b ? a : b; });
  for (int i = 0; i < kStep; ++i) {
    const float t = top[i % Lanes];
    shift[i] = t == -infinity || t == infinity ? 0.0f : t;
  }

  F shifts[kVectors], partial[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    shifts[v] = S::load(shift + v * S::kWidth);
    partial[v] = S::zero();
  }
  for (int64_t i = 0; i < padded; i += kStep)
    for (int v = 0; v < kVectors; ++v) {
      float* p = logits + i + v * S::kWidth;
      const F e = exponential<S>(S::sub(S::load(p), shifts[v]));
      S::store(p, e);
      partial[v] = S::add(partial[v], e);
    }
  for (int r = 0; r < Lanes; ++r) sums[r] = 0;
  fold_lanes<S>(partial, kVectors, Lanes, sums, [](float a, float b) { return a + b; });
  for (int r = 0; r < Lanes; ++r) {
    rescale[r] = top[r] == highest[r] ? 1.0f : __builtin_expf(highest[r] - shift[r]);
    total[r] = total[r] * rescale[r] + sums[r];
    highest[r] = top[r];
  }
}

template <class S>
void softmax_step(float* logits, int64_t count, int lanes, float* highest, float* total,
                  float* rescale) {
  if (lanes == kTile)
    softmax_step_lanes<S, kTile>(logits, count, highest, total, rescale);
  else
    softmax_step_lanes<S, kPanel>(logits, count, highest, total, rescale);
}

// ---- values -------------------------------------------------------------------------------------

// Rows of values that are summed before the next are read: each is read once per few columns, which
// must find it in the first-level cache. Meanwhile the rows of the next turn are brought there.
constexpr int64_t kRowsPerTurn = 32;

// Rows [first, stop) of a choice.
struct Turn {
  int64_t first;
  int64_t stop;
};

// Prefetches elements [from, from + count) of row i of a choice, if it has that many.
template <class S, class T>
inline void prefetch_part(const Rows& rows, const RowChoice& choice, int64_t i, int from,
                          int count) {
  if (choice.ids && i >= choice.count) return;
  const T* row = rows.row<T>(row_index<S>(choice, i));
  for (int at = from; at < from + count; at += 64 / static_cast<int>(sizeof(T))) prefetch(row + at);
}

// Four rows of sums over `Vectors` vectors of the value, for the keys of one turn. bfloat16 is
// widened two vectors at a time, elements at even places and at odd ones, which takes half the
// instructions; the sums are kept in that order meanwhile.
template <class S, class T, int Vectors, bool Prefetch>
inline void accumulate_columns(const Rows& values, const RowChoice& choice, Turn turn,
                               const float* weights, int lanes, int column, float* acc) {
  constexpr bool kPairs = std::is_same_v<T, Bfloat16> && Vectors % 2 == 0;
  constexpr int kStep = kPairs ? 2 : 1;
  typename S::F sums[kTile][Vectors];
  const auto each = [](auto body) LONGREACH_INLINE {
    unrolled<kTile>([&](auto r) LONGREACH_INLINE {
      unrolled<Vectors / kStep>([&](auto v) LONGREACH_INLINE { body(r, Constant<v * kStep>()); });
    });
  };
  const auto place = [&](int r, int v)
                         LONGREACH_INLINE { return acc + r * values.dim + column + v * S::kWidth; };
  each([&](auto r, auto v) LONGREACH_INLINE {
    if constexpr (kPairs)
      S::part_two(S::load(place(r, v)), S::load(place(r, v + 1)), sums[r][v], sums[r][v + 1]);
    else
      sums[r][v] = S::load(place(r, v));
  });
  for (int64_t i = turn.first; i < turn.stop; ++i) {
    if (Prefetch) {
      constexpr int kColumns = Vectors * S::kWidth;
      prefetch_part<S, T>(values, choice, i + kRowsPerTurn, column, kColumns);
      prefetch_upcoming<S, T>(choice, i, column, kColumns);
    }
    const T* value = values.row<T>(row_index<S>(choice, i)) + column;
    typename S::F x[Vectors];
    unrolled<Vectors / kStep>([&](auto pair) LONGREACH_INLINE {
      constexpr int v = pair * kStep;
      if constexpr (kPairs)
        S::load_two(value + v * S::kWidth, x[v], x[v + 1]);
      else
        x[v] = S::load(value + v * S::kWidth);
    });
    unrolled<kTile>([&](auto r) LONGREACH_INLINE {
      const auto weight = S::all(weights[i * lanes + r]);
      unrolled<Vectors>([&](auto v)
                            LONGREACH_INLINE { sums[r][v] = S::fma(weight, x[v], sums[r][v]); });
    });
  }
  each([&](auto r, auto v) LONGREACH_INLINE {
    if constexpr (kPairs) {
      typename S::F a, b;
      S::join_two(sums[r][v], sums[r][v + 1], a, b);
      S::store(place(r, v), a);
      S::store(place(r, v + 1), b);
    } else {
      S::store(place(r, v), sums[r][v]);
    }
  });
}

// The same. What comes next is prefetched with the first rows of sums, a line with the columns that
// it begins in.
template <class S, class T, int Vectors>
inline void accumulate_columns(const Rows& values, const RowChoice& choice, Turn turn,
                               const float* weights, int lanes, int column, bool first_rows,
                               float* acc) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  if (first_rows && column % kLine < Vectors * S::kWidth)
    accumulate_columns<S, T, Vectors, true>(values, choice, turn, weights, lanes, column, acc);
  else
    accumulate_columns<S, T, Vectors, false>(values, choice, turn, weights, lanes, column, acc);
}

// The last columns, fewer than a vector.
template <class S, class T>
inline void accumulate_rest(const Rows& values, const RowChoice& choice, Turn turn,
                            const float* weights, int lanes, int column, float* acc) {
  const int left = values.dim - column;
  typename S::F sums[kTile];
  for (int r = 0; r < kTile; ++r) sums[r] = S::load_part(acc + r * values.dim + column, left);
  for (int64_t i = turn.first; i < turn.stop; ++i) {
    const auto x = S::load_part(values.row<T>(row_index<S>(choice, i)) + column, left);
    for (int r = 0; r < kTile; ++r) sums[r] = S::fma(S::all(weights[i * lanes + r]), x, sums[r]);
  }
  for (int r = 0; r < kTile; ++r) S::store_part(acc + r * values.dim + column, sums[r], left);
}

template <class S, class T>
void accumulate_typed(const Rows& values, const RowChoice& choice, const float* weights, int lanes,
                      float* acc) {
  prefetch_first<S, T>(values, choice, kRowsPerTurn);
  for (int64_t at = 0; at < choice.count; at += kRowsPerTurn) {
    const Turn turn{at, at + kRowsPerTurn < choice.count ? at + kRowsPerTurn : choice.count};
    for (int r = 0; r < lanes; r += kTile) {
      const float* w = weights + r;
      float* sums = acc + r * values.dim;
      int column = 0;
      for (; column + S::kValueVectors * S::kWidth <= values.dim;
           column += S::kValueVectors * S::kWidth)
        accumulate_columns<S, T, S::kValueVectors>(values, choice, turn, w, lanes, column, r == 0,
                                                   sums);
      for (; column + S::kWidth <= values.dim; column += S::kWidth)
        accumulate_columns<S, T, 1>(values, choice, turn, w, lanes, column, r == 0, sums);
      if (column < values.dim) accumulate_rest<S, T>(values, choice, turn, w, lanes, column, sums);
    }
  }
}

template <class S>
void accumulate(const Rows& values, const RowChoice& choice, const float* weights, int lanes,
                float* acc) {
  switch (values.type) {
    case Storage::kFloat32:
      return accumulate_typed<S, float>(values, choice, weights, lanes, acc);
    case Storage::kFloat16:
      return accumulate_typed<S, Half>(values, choice, weights, lanes, acc);
    case Storage::kBfloat16:
      return accumulate_typed<S, Bfloat16>(values, choice, weights, lanes, acc);
  }
}

// ---- widening -----------------------------------------------------------------------------------

template <class S, class T>
void widen_typed(const Rows& rows, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i, out += rows.dim) {
    const T* row = rows.row<T>(first + i);
    prefetch_row<S, T>(rows, first + i + kStreamAhead);
    int c = 0;
    for (; c + S::kWidth <= rows.dim; c += S::kWidth) S::store(out + c, S::load(row + c));
    if (c < rows.dim) S::store_part(out + c, S::load_part(row + c, rows.dim - c), rows.dim - c);
  }
}

template <class S>
void widen(const Rows& rows, int64_t first, int64_t count, float* out) {
  switch (rows.type) {
    case Storage::kFloat32:
      return widen_typed<S, float>(rows, first, count, out);
    case Storage::kFloat16:
      return widen_typed<S, Half>(rows, first, count, out);
    case Storage::kBfloat16:
      return widen_typed<S, Bfloat16>(rows, first, count, out);
  }
}

// ---- selection ----------------------------------------------------------------------------------

template <class S>
void value_range(const float* values, int64_t count, float* lowest, float* highest) {
  auto low = S::all(values[0]), high = low;
  int64_t i = 0;
  for (; i + S::kWidth <= count; i += S::kWidth) {
    const auto x = S::load(values + i);
    low = S::min(x, low);
    high = S::max(x, high);
  }
  float lows[S::kWidth], highs[S::kWidth];
  S::store(lows, low);
  S::store(highs, high);
  *lowest = lows[0];
  *highest = highs[0];
  const auto widen_to = [&](float a, float b) {
    if (a < *lowest) *lowest = a;
    if (b > *highest) *highest = b;
  };
  for (int lane = 1; lane < S::kWidth; ++lane) widen_to(lows[lane], highs[lane]);
  for (; i < count; ++i) widen_to(values[i], values[i]);
}

template <class S>
int64_t count_above(const float* values, int64_t count, float threshold) {
  const auto bar = S::all(threshold);
  int64_t above = 0, i = 0;
  for (; i + S::kWidth <= count; i += S::kWidth) above += S::count_above(S::load(values + i), bar);
  for (; i < count; ++i) above += values[i] > threshold;
  return above;
}

template <class S>
double sum_above(const float* values, int64_t count, float threshold) {
  constexpr int64_t kRun = 64 * S::kWidth;  // summed in float before it joins the double
  const auto bar = S::all(threshold);
  double sum = 0;
  int64_t i = 0;
  while (i + S::kWidth <= count) {
    auto part = S::zero();
    for (const int64_t stop = i + kRun; i < stop && i + S::kWidth <= count; i += S::kWidth)
      part = S::add(part, S::keep_above(S::load(values + i), bar));
    float lanes[S::kWidth];
    S::store(lanes, part);
    for (int lane = 0; lane < S::kWidth; ++lane) sum += static_cast<double>(lanes[lane]);
  }
  for (; i < count; ++i)
    if (values[i] > threshold) sum += static_cast<double>(values[i]);
  return sum;
}

// The highest scores so far, ascending.
template <class S>
struct Highest {
  int32_t scores[kMostHighest];
  int64_t count;

  void enter(int32_t score) {
    if (score <= scores[0]) return;
    int64_t at = 1;
    for (; at < count && scores[at] < score; ++at) scores[at - 1] = scores[at];
    scores[at - 1] = score;
  }
};

// A pass over all scores for the highest of every 64th, another for the few above the `wanted`-th
// of these, which as many scores reach.
template <class S>
int32_t nth_highest(const int32_t* scores, int64_t count, int64_t wanted) {
  constexpr int32_t kLowest = -2147483647 - 1;
  constexpr int64_t kLanes = kMostHighest;
  Highest<S> highest;
  highest.count = wanted;
  const auto start = [&](int32_t score) {
    for (int64_t i = 0; i < wanted; ++i) highest.scores[i] = score;
  };
  start(kLowest);
  if (count >= 2 * kLanes) {
    int32_t tops[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) tops[j] = scores[j];
    for (int64_t i = kLanes; i + kLanes <= count; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j)
        tops[j] = scores[i + j] > tops[j] ? scores[i + j] : tops[j];
    for (int64_t j = 0; j < kLanes; ++j) highest.enter(tops[j]);
    const int32_t reached = highest.scores[0];
    start(reached > kLowest ? reached - 1 : kLowest);
  }
  const auto any_above = [&](int64_t from, auto lanes) LONGREACH_INLINE {
    const int32_t bar = highest.scores[0];
    int32_t above = 0;
    for (int64_t j = 0; j < lanes; ++j) above |= scores[from + j] > bar ? 1 : 0;
    return above != 0;
  };
  constexpr int64_t kStep = 16;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (!any_above(i, Constant<kLanes>())) continue;
    for (int64_t part = i; part < i + kLanes; part += kStep)
      if (any_above(part, Constant<kStep>()))
        for (int64_t j = 0; j < kStep; ++j) highest.enter(scores[part + j]);
  }
  for (; i < count; ++i) highest.enter(scores[i]);
  return highest.scores[0];
}

// ---- tail of a code scan ------------------------------------------------------------------------

// exp(logit - reference) of a head's scores, given as floats: see CodeTail.
template <class S>
inline typename S::F tail_weights(const CodeTail& tail, int head, typename S::F scores) {
  if (tail.softcap > 0) {
    const auto logits = S::fma(scores, S::all(tail.slope[head]), S::all(tail.offset[head]));
    return exponential<S>(S::sub(capped<S>(logits, tail.softcap), S::all(tail.reference[head])));
  }
  constexpr float kLog2e = 1.44269504088896341f;
  return rough_exp2<S>(S::fma(scores, S::all(tail.slope[head] * kLog2e),
                              S::all((tail.offset[head] - tail.reference[head]) * kLog2e)));
}

// ---- number of heads as a compile-time constant -------------------------------------------------

// Calls body(Constant<heads>()) for heads in [1, kCodeHeads].
template <class Body>
inline void with_heads(int heads, Body body) {
  switch (heads) {
    case 1:
      return body(Constant<1>());
    case 2:
      return body(Constant<2>());
    case 3:
      return body(Constant<3>());
    case 4:
      return body(Constant<4>());
    case 5:
      return body(Constant<5>());
    case 6:
      return body(Constant<6>());
    case 7:
      return body(Constant<7>());
    case 8:
      return body(Constant<8>());
  }
}

}  // namespace vector
}  // namespace longreach
