// Attention of new tokens over the positions of the cache that each of them sees, for XLA on a CPU:
// nothing else is read. In float32.
//
// The queries that share a key/value head, of one token or several, are rows of the products. A row
// sees what all of them see together; its share of the rest is zero. With a few rows, keys and values
// are read once, at the memory's pace, and widened in registers (rows.h). With many they are panels
// (panel.h), a block of positions after the other: the largest score, the sum of shares and the result
// so far are scaled when a block raises the first (the online softmax of FlashAttention, arXiv
// 2205.14135).

#include <cmath>

#include "panel.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kBlock = 512;  // positions that many rows see together
constexpr int64_t kRows = 96;    // at most, where there are many; a multiple of what one tile has
constexpr int64_t kFewQueries = 16;  // of one key; twice as many where halves are multiplied in pairs

struct Scores {
  float scale, softcap;  // softcap: 0 is none
  int64_t window;        // 0 is none
};

// Of share[R][len], whose rows are `width` apart, and the values v[len][H], the sums of C steps of
// features: o[R][...], whose rows are H apart.
template <int R, int C, typename T>
void MixSome(const float* share, const typename T::Stored* v, float* o, int64_t len, int64_t width,
             int64_t H) {
  constexpr int kVectors = T::kStep / kLanes;
  Floats sum[R][C][kVectors] = {};
  for (int64_t s = 0; s < len; ++s) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const typename T::Stored* from = v + s * H + c * T::kStep;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
      Floats value[kVectors];
      T::Split(from, value);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n) sum[r][c][n] += share[r * width + s] * value[n];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < C * T::kStep; ++k) {
      int64_t place = k % T::kStep;
      o[r * H + k] = sum[r][k / T::kStep][place % kVectors][place / kVectors];
    }
  }
}

// All features of R rows.
template <int R, typename T>
void Mix(const float* share, const typename T::Stored* v, float* o, int64_t len, int64_t width,
         int64_t H) {
  constexpr int kMany = 4 * kLanes / T::kStep;  // steps that are four vectors of float32
  int64_t h = 0;
  for (; h + kMany * T::kStep <= H; h += kMany * T::kStep) {
    MixSome<R, kMany, T>(share, v + h, o + h, len, width, H);
  }
  for (; h + T::kStep <= H; h += T::kStep) MixSome<R, 1, T>(share, v + h, o + h, len, width, H);
  for (; h < H; ++h) {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t s = 0; s < len; ++s) sum += share[r * width + s] * T::Widen(v[s * H + h]);
      o[r * H + h] = sum;
    }
  }
}

// e^x for x <= 0, to a few units in the last place: 2^n times a polynomial of what is left of the
// exponent (the Taylor series of 2^r, |r| <= 1/2, whose next term is below 2^-24).
inline Floats Exp(Floats x) {
  constexpr float kLog2e = 1.44269504f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  x = x < -87.0f ? Floats{} - 87.0f : x;
  Floats t = x * kLog2e, n = (t + kRound) - kRound, r = t - n;
  Floats p = r * 1.54035304e-4f + 1.33335581e-3f;
  p = p * r + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.0f;
  Words bits = Bits<Words>(n + kRound) << 23;  // n is in the low bits of that sum
  return Bits<Floats>(Bits<Words>(p) + bits);
}

// What a row has seen so far.
struct Seen {
  float top = -INFINITY, sum = 0;  // the largest score, and the sum of e^(score - top)
};

// The scores [first, end) of one row become e^(score - top), in place; all others of `width`, whole
// vectors, zero. Returns what earlier shares are to be multiplied with, as `top` may have risen.
inline float Share(float* row, int64_t first, int64_t end, int64_t width, const Scores& scores,
                   Seen& seen) {
  if (first >= end) {
    std::fill(row, row + width, 0.0f);
    return 1;
  }
  float scale = scores.scale;
  if (scores.softcap > 0) {
    for (int64_t s = first; s < end; ++s) {
      row[s] = std::tanh(row[s] * scale / scores.softcap) * scores.softcap;
    }
    scale = 1.0f;
  }
  std::fill(row, row + first, -INFINITY);
  std::fill(row + end, row + width, -INFINITY);
  Floats tops = Floats{} - INFINITY, sums = {};
  for (int64_t s = 0; s < width; s += kLanes) {
    Floats x = Load<Floats>(row + s) * scale;
    tops = x > tops ? x : tops;
    std::memcpy(row + s, &x, sizeof(x));
  }
  float top = seen.top;
  for (int n = 0; n < kLanes; ++n) top = std::max(top, tops[n]);
  for (int64_t s = 0; s < width; s += kLanes) {
    Floats e = Exp(Load<Floats>(row + s) - top);
    sums += e;
    std::memcpy(row + s, &e, sizeof(e));
  }
  std::fill(row, row + first, 0.0f);
  std::fill(row + end, row + width, 0.0f);
  float before = std::exp(seen.top - top);
  seen.top = top, seen.sum = seen.sum * before + Sum(sums);
  return before;
}

// One key/value head of one sequence, and the queries of some of its tokens that share it: G rows of
// each token.
template <typename Stored>
struct Head {
  const Stored *q, *k, *v;  // k and v [S][H]
  float* o;                 // like q
  int64_t tokens, at;       // how many, and the position of the first
  int64_t stride;           // from a token to the next in q and o
  int64_t G, H;
  Scores scores;

  int64_t Rows() const { return tokens * G; }
  // The positions a row sees, [First, Last).
  int64_t First(int64_t row) const {
    return scores.window > 0 ? std::max<int64_t>(0, Last(row) - scores.window) : 0;
  }
  int64_t Last(int64_t row) const { return at + row / G + 1; }

  void Queries(std::vector<Stored>& to) const {
    to.resize(Rows() * H);
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy(q + t * stride, q + t * stride + G * H, to.begin() + t * G * H);
    }
  }
  // The sums `mixed` of all rows over the sums of their shares.
  void Results(const std::vector<float>& mixed, const std::vector<Seen>& seen) const {
    for (int64_t r = 0; r < Rows(); ++r) {
      const float* from = mixed.data() + r * H;
      float* to = o + r / G * stride + r % G * H;
      float scaled = 1 / seen[r].sum;
      for (int64_t h = 0; h < H; ++h) to[h] = from[h] * scaled;
    }
  }
};

// What a thread needs. It keeps it: memory that is asked for anew is cleared page by page.
template <typename Stored>
struct Kept {
  std::vector<Stored> queries;
  std::vector<float> held, share, mixed, values;
  std::vector<Seen> seen;
};

template <typename T>
void AttendFew(const Head<typename T::Stored>& head) {
  thread_local Kept<typename T::Stored> room;
  int64_t rows = head.Rows(), H = head.H, first = head.First(0), len = head.Last(rows - 1) - first;
  int64_t width = (len + kLanes - 1) / kLanes * kLanes;
  auto *k = head.k + first * H, *v = head.v + first * H;
  head.Queries(room.queries);
  room.share.resize(std::max<size_t>(room.share.size(), rows * width));
  room.mixed.resize(rows * H);
  room.seen.assign(rows, {});
  float *share = room.share.data(), *mixed = room.mixed.data();
  auto* x = T::Rows(room.queries.data(), rows, H, room.held);
  Range<T>(x, k, share, rows, H, width, 0, len);
  for (int64_t r = 0; r < rows; ++r) {
    Share(share + r * width, head.First(r) - first, head.Last(r) - first, width, head.scores,
          room.seen[r]);
  }
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) Mix<4, T>(share + r * width, v, mixed + r * H, len, width, H);
  for (; r < rows; ++r) Mix<1, T>(share + r * width, v, mixed + r * H, len, width, H);
  head.Results(room.mixed, room.seen);
}

// H is a multiple of kLanes.
template <typename T>
void AttendMany(const Head<typename T::Stored>& head) {
  thread_local Kept<typename T::Stored> room;
  int64_t rows = head.Rows(), H = head.H, last = head.Last(rows - 1);
  head.Queries(room.queries);
  room.share.resize(kRows * kBlock);
  room.mixed.assign(rows * H, 0.0f);
  room.seen.assign(rows, {});
  float *share = room.share.data(), *mixed = room.mixed.data();
  auto* x = As<typename T::Row>(room.queries.data(), rows * H, room.held);
  for (int64_t block = head.First(0); block < last; block += kBlock) {
    int64_t len = std::min(kBlock, last - block), width = (len + kLanes - 1) / kLanes * kLanes;
    for (int64_t s = 0; s < len; s += kPanel * kLanes) {
      int64_t some = std::min<int64_t>(kPanel * kLanes, len - s);
      Panel<T>(x, head.k + (block + s) * H, share + s, rows, H, width, some);
    }
    for (int64_t r = 0; r < rows; ++r) {
      int64_t from = std::max<int64_t>(0, head.First(r) - block);
      int64_t to = std::min(len, head.Last(r) - block);
      float before = Share(share + r * width, from, to, width, head.scores, room.seen[r]);
      for (int64_t h = 0; h < H; ++h) mixed[r * H + h] *= before;
    }
    // Values are a panel as they lie, once they are float32.
    auto* values = As<float>(head.v + block * H, len * H, room.values);
    auto* panel = reinterpret_cast<const uint32_t*>(values);
    auto mix = [&](int64_t h, auto vectors) {
      constexpr int64_t kFeatures = vectors * kLanes;
      Tiles<vectors, Singles>(share, panel + h, mixed + h, rows, len, H, width, H, kFeatures, false);
      return h + kFeatures;
    };
    int64_t h = 0;
    while (h + kPanel * kLanes <= H) h = mix(h, std::integral_constant<int, kPanel>{});
    while (h < H) h = mix(h, std::integral_constant<int, 1>{});
  }
  head.Results(room.mixed, room.seen);
}

// Few: how a few rows are held beside keys and values, Many: how many are.
template <typename Few, typename Many>
ffi::Error Run(ffi::ThreadPool& pool, int64_t threads, const Scores& scores, ffi::AnyBuffer q,
               ffi::AnyBuffer k, ffi::AnyBuffer v, const int32_t* position, float* o) {
  using Stored = typename Few::Stored;
  auto shape = k.dimensions();
  int64_t B = shape[0], K = shape[1], S = shape[2], H = shape[3];
  int64_t new_tokens = q.dimensions()[1], N = q.dimensions()[2], G = N / K;
  bool many = new_tokens * G > kFewQueries * Many::kInputs && G <= kRows && H % kLanes == 0;
  int64_t most = many ? kRows : kMostRows;
  int64_t together = std::min(new_tokens, std::max<int64_t>(1, most / G));
  int64_t parts = (new_tokens + together - 1) / together;
  auto at = [](ffi::AnyBuffer x) { return static_cast<const Stored*>(x.untyped_data()); };
  InParallel(pool, threads, B * K * parts, [&](int64_t n) {
    int64_t head = n / parts, b = head / K, token = n % parts * together;
    int64_t place = std::clamp<int64_t>(position[b] + token, 0, S - 1);
    int64_t tokens = std::min({together, new_tokens - token, S - place});
    int64_t row = ((b * new_tokens + token) * N + head % K * G) * H, from = head * S * H;
    auto attend = many ? AttendMany<Many> : AttendFew<Few>;
    attend({at(q) + row, at(k) + from, at(v) + from, o + row, tokens, place, N * H, G, H, scores});
  });
  return ffi::Error::Success();
}

ffi::Error AttendCached(ffi::ThreadPool pool, int64_t threads, float scale, float softcap,
                     int64_t window, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::S32> position, ffi::ResultBuffer<ffi::F32> o) {
  auto qs = q.dimensions(), ks = k.dimensions();
  auto held = static_cast<int64_t>(position.element_count());
  if (qs.size() != 4 || ks.size() != 4 || qs[0] != ks[0] || qs[3] != ks[3] ||
      qs[2] % ks[1] != 0 || v.element_count() != k.element_count() || held != ks[0]) {
    return ffi::Error::InvalidArgument("q[B,T,N,H], k and v [B,K,S,H] and position[B] are meant");
  }
  Scores scores{scale, softcap, window};
  auto is = [&](ffi::DataType query, ffi::DataType held) {
    return q.element_type() == query && k.element_type() == held && v.element_type() == held;
  };
  if (is(ffi::DataType::F32, ffi::DataType::F32)) {
    return Run<F32, Singles>(pool, threads, scores, q, k, v, position.typed_data(), o->typed_data());
  }
  if (is(ffi::DataType::BF16, ffi::DataType::U16)) {
    return Run<BF16, Pairs>(pool, threads, scores, q, k, v, position.typed_data(), o->typed_data());
  }
  return ffi::Error::InvalidArgument("float32, or bfloat16 with a cache of its bits, is meant");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tpjax_attend, AttendCached,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
