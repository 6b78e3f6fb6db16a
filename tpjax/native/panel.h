// Products of many rows: y[R,O] = x[R,I] w[O,I]^T, a panel of outputs at a time. The panel is brought
// into an order in which one word of x meets a vector of outputs at once, some of the inputs at a
// time, so that it stays in the second cache; and the sums of a few rows stay in registers.

#pragma once

#include "rows.h"

namespace {

// Sums fill the registers (32 or 16), beside the words of the panel they meet.
#if defined(__AVX512F__)
constexpr int kHigh = 8;   // rows of x
constexpr int kPanel = 3;  // vectors of outputs
#else
constexpr int kHigh = 6;
constexpr int kPanel = 2;
#endif
constexpr int64_t kDeep = 2048;       // words of x that meet a panel before others do
constexpr int64_t kPanelAhead = 256;  // bytes from what is read to what is asked for

// What a word, of 32 bits, of the panel and of x is: one input in float32, of a matrix stored so or in
// bfloat16; or two of bfloat16, where the processor multiplies these. kFew: rows for which bringing a
// panel into order takes longer than it saves. With few registers dot products widen a matrix again for
// every few rows, so there a panel is worth it sooner.
struct Singles {
  using Stored = float;
  using Row = float;
  static constexpr int kInputs = 1, kFew = 16;
  static uint32_t Word(const float* w) { return Bits<uint32_t>(*w); }
  static void Split(Words word, Words* to) { to[0] = word; }
  static void Add(Floats& sum, uint32_t x, Words w) { sum += Bits<float>(x) * Bits<Floats>(w); }
};

struct Widening {
  using Stored = uint16_t;
  using Row = float;
  static constexpr int kInputs = 1, kFew = kLanes > 8 ? 16 : 10;
  static uint32_t Word(const uint16_t* w) { return uint32_t{*w} << 16; }
  static void Split(Words word, Words* to) { to[0] = word << 16, to[1] = word & 0xffff0000u; }
  static void Add(Floats& sum, uint32_t x, Words w) { Singles::Add(sum, x, w); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Stored = uint16_t;
  using Row = uint16_t;
  static constexpr int kInputs = 2, kFew = 32;
  static uint32_t Word(const uint16_t* w) { return Load<uint32_t>(w); }
  static void Split(Words word, Words* to) { to[0] = word; }
  static void Add(Floats& sum, uint32_t x, Words w) {
    __m512bh pair = Bits<__m512bh>(Words{} + x);
    sum = Bits<Floats>(_mm512_dpbf16_ps(Bits<__m512>(sum), pair, Bits<__m512bh>(w)));
  }
};
#else
using Pairs = Widening;
#endif

// A thread's panel.
inline uint32_t* Room() {
  thread_local std::vector<uint32_t> room(kDeep * kPanel * kLanes + 16);
  return reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
}

// Rows as they are, or widened into `room`.
template <typename Row, typename X>
const Row* As(const X* x, int64_t count, std::vector<float>& room) {
  if constexpr (std::is_same_v<Row, X>) {
    return x;
  } else {
    if (room.size() < static_cast<size_t>(count)) room.resize(count);
    for (int64_t n = 0; n < count; ++n) room[n] = Bits<float>(uint32_t{x[n]} << 16);
    return room.data();
  }
}

template <int kStep>
inline void Swap(Words* x) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    Words a = x[i], b = x[i + kStep];
    x[i] = Low<kStep>(a, b);
    x[i + kStep] = High<kStep>(a, b);
  }
}

// kLanes vectors: columns become rows.
inline void Transpose(Words* x) {
  Swap<1>(x), Swap<2>(x), Swap<4>(x);
  if constexpr (kLanes > 8) Swap<8>(x);
}

// `words` words of `rows` rows of the matrix as panel[words][V kLanes]; a row that is not there is
// the last one again.
template <int V, typename T>
void Pack(const typename T::Stored* w, int64_t rows, int64_t words, int64_t in, uint32_t* panel) {
  constexpr int kSplit = 4 / sizeof(typename T::Stored) / T::kInputs;  // words in one of the matrix
  auto from = [&](int64_t k, int64_t lane) {
    return w + std::min<int64_t>(lane, rows - 1) * in + k * T::kInputs;
  };
  auto to = [&](int64_t k, int64_t lane) { return panel + k * V * kLanes + lane; };
  int64_t k = 0;
  for (; k + kLanes * kSplit <= words; k += kLanes * kSplit) {
    for (int v = 0; v < V; ++v) {
      Words x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        auto row = from(k, v * kLanes + i);
        __builtin_prefetch(reinterpret_cast<const char*>(row) + kPanelAhead);
        x[i] = Load<Words>(row);
      }
      Transpose(x);
      for (int i = 0; i < kLanes; ++i) {
        Words split[kSplit];
        T::Split(x[i], split);
        for (int n = 0; n < kSplit; ++n) {
          std::memcpy(to(k + i * kSplit + n, v * kLanes), &split[n], sizeof(Words));
        }
      }
    }
  }
  for (; k < words; ++k) {
    for (int lane = 0; lane < V * kLanes; ++lane) *to(k, lane) = T::Word(from(k, lane));
  }
}

// R rows of x with a panel whose words are `width` apart, added to what is in y unless it is the `first`
// of its outputs.
template <int R, int V, typename T>
void Tile(const typename T::Row* x, const uint32_t* panel, float* y, int64_t words, int64_t width,
          int64_t in, int64_t out, int64_t outputs, bool first) {
  Floats sum[R][V] = {};
  for (int64_t k = 0; k < words; ++k) {
    Words column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) column[v] = Load<Words>(panel + k * width + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      auto word = Load<uint32_t>(x + r * in + k * T::kInputs);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) T::Add(sum[r][v], word, column[v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float* to = y + r * out;
    for (int v = 0; v < V; ++v) {
      int64_t here = std::min<int64_t>(kLanes, outputs - v * kLanes);
      if (here == kLanes) {
        Floats all = first ? sum[r][v] : sum[r][v] + Load<Floats>(to + v * kLanes);
        std::memcpy(to + v * kLanes, &all, sizeof(all));
      } else {
        for (int n = 0; n < here; ++n) {
          to[v * kLanes + n] = sum[r][v][n] + (first ? 0.0f : to[v * kLanes + n]);
        }
      }
    }
  }
}

// All rows with a panel of V vectors.
template <int V, typename T>
void Tiles(const typename T::Row* x, const uint32_t* panel, float* y, int64_t rows, int64_t words,
           int64_t width, int64_t in, int64_t out, int64_t outputs, bool first) {
  auto tiles = [&](auto high) {
    for (; rows >= high; rows -= high, x += high * in, y += high * out) {
      Tile<high, V, T>(x, panel, y, words, width, in, out, outputs, first);
    }
  };
  tiles(std::integral_constant<int, kHigh>{});
  tiles(std::integral_constant<int, 2>{});
  tiles(std::integral_constant<int, 1>{});
}

// All rows with up to V vectors of outputs.
template <int V, typename T>
void Vectors(const typename T::Row* x, const typename T::Stored* w, float* y, int64_t rows,
             int64_t in, int64_t out, int64_t outputs) {
  uint32_t* panel = Room();
  int64_t all = in / T::kInputs, k = 0;
  do {
    int64_t words = std::min(kDeep, all - k), at = k * T::kInputs;
    Pack<V, T>(w + at, outputs, words, in, panel);
    Tiles<V, T>(x + at, panel, y, rows, words, V * kLanes, in, out, outputs, k == 0);
  } while ((k += kDeep) < all);
}

// All rows with the `outputs` of one panel, at most kPanel kLanes; `in` is a multiple of kInputs.
template <typename T>
void Panel(const typename T::Row* x, const typename T::Stored* w, float* y, int64_t rows, int64_t in,
           int64_t out, int64_t outputs) {
  auto run = outputs > 2 * kLanes ? Vectors<kPanel, T>
             : outputs > kLanes   ? Vectors<2, T>
                                  : Vectors<1, T>;
  run(x, w, y, rows, in, out, outputs);
}

}  // namespace
