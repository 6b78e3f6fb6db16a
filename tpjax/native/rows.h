// What our kernels for CPUs share: vectors, products of a few rows with a matrix, and threads.
//
// With few rows a product is as fast as its weights are read. They are read one after the other, one
// or a few rows of the matrix at a time, once for up to eight rows of x, into accumulators that stay
// in registers. Vectors are the compiler's: as wide as the machine it builds for has them; and where
// it has an instruction that multiplies bfloat16, that is used.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

// Accumulators fill the registers, of which there are 32 or 16.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMostRows = 8;  // of x, at once
constexpr int kBeside = 4;    // rows of the matrix that are read side by side
#else
constexpr int kLanes = 8;
constexpr int kMostRows = 4;
constexpr int kBeside = 2;
#endif
constexpr int64_t kAhead = 1024;   // bytes from what is read to what is asked for

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

template <typename To, typename From>
inline To Bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename T>
inline V Load(const T* from) {
  V to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// Halves onto halves: a few vector additions, where one after the other would be a chain of sixteen.
inline float Sum(Floats x) {
  float sum[kLanes];
  std::memcpy(sum, &x, sizeof(x));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int n = 0; n < half; ++n) sum[n] += sum[n + half];
  }
  return sum[0];
}

// Of two vectors the lanes whose places have no kStep in them (kPart 0), or those that have (1); those
// of b where the place in the result has it.
template <int kStep, int kPart, typename V, int... kLane>
inline V Part(V a, V b, std::integer_sequence<int, kLane...>) {
#define TPJAX_FROM ((kLane & ~kStep) + kPart * kStep + (kLane & kStep ? kLanes : 0))
#if defined(__clang__)
  return __builtin_shufflevector(a, b, TPJAX_FROM...);
#else  // before version 12 gcc has only this
  return __builtin_shuffle(a, b, Words{static_cast<uint32_t>(TPJAX_FROM)...});
#endif
#undef TPJAX_FROM
}

template <int kStep, typename V>
inline V Low(V a, V b) {
  return Part<kStep, 0>(a, b, std::make_integer_sequence<int, kLanes>{});
}

template <int kStep, typename V>
inline V High(V a, V b) {
  return Part<kStep, 1>(a, b, std::make_integer_sequence<int, kLanes>{});
}

template <int kStep>
inline void AddNeighbours(Floats* x) {
#pragma GCC unroll 8
  for (int n = 0; n < kLanes / 2 / kStep; ++n) {
    Floats a = x[2 * n], b = x[2 * n + 1];
    x[n] = Low<kStep>(a, b) + High<kStep>(a, b);
  }
}

// The sums of kLanes vectors, in their order, left in the first of them: neighbours are added until
// every lane is one vector's.
inline void SumEach(Floats* x) {
  AddNeighbours<1>(x), AddNeighbours<2>(x), AddNeighbours<4>(x);
  if constexpr (kLanes > 8) AddNeighbours<8>(x);
}

// How a matrix is stored; how x is held beside it, as `Row`s; and how kStep products of the two are
// added up.
struct F32 {
  using Stored = float;
  using Row = float;
  static constexpr int64_t kStep = kLanes;
  static float Widen(float x) { return x; }
  static void Add(Floats& sum, const float* x, Floats w) { sum += Load<Floats>(x) * w; }
  static Floats Read(const float* w) { return Load<Floats>(w); }
  static void Split(const float* from, Floats* to) { to[0] = Load<Floats>(from); }
  static const float* Rows(const float* x, int64_t, int64_t, std::vector<float>&) { return x; }
};

// Of every word of two bfloat16 numbers the first, once it is shifted, and the second, once its lower
// half is cleared: the even places of a vector, and the odd ones.
inline void SplitWords(Words words, Floats* to) {
  to[0] = Bits<Floats>(words << 16);
  to[1] = Bits<Floats>(words & 0xffff0000u);
}

// Words are split, so x is sorted: of every vector the even places first.
struct Widened {
  using Stored = uint16_t;
  using Row = float;
  static constexpr int64_t kStep = 2 * kLanes;
  static float Widen(uint16_t x) { return Bits<float>(uint32_t{x} << 16); }
  static float Widen(float x) { return x; }
  static void Add(Floats& sum, const float* x, Words w) {
    Floats column[2];
    SplitWords(w, column);
    sum += Load<Floats>(x) * column[0];
    sum += Load<Floats>(x + kLanes) * column[1];
  }
  static Words Read(const uint16_t* w) { return Load<Words>(w); }
  static void Split(const uint16_t* from, Floats* to) { SplitWords(Load<Words>(from), to); }
  template <typename X>
  static const float* Rows(const X* x, int64_t rows, int64_t in, std::vector<float>& sorted) {
    sorted.resize(rows * in);
    int64_t whole = in / kStep * kStep;
    for (int64_t r = 0; r < rows; ++r, x += in) {
      float* to = sorted.data() + r * in;
      for (int64_t k = 0; k < whole; k += kStep) {
        for (int n = 0; n < kLanes; ++n) {
          to[k + n] = Widen(x[k + 2 * n]);
          to[k + kLanes + n] = Widen(x[k + 2 * n + 1]);
        }
      }
      for (int64_t k = whole; k < in; ++k) to[k] = Widen(x[k]);
    }
    return sorted.data();
  }
};

#if defined(__AVX512BF16__)
struct BF16 {
  using Stored = uint16_t;
  using Row = uint16_t;
  static constexpr int64_t kStep = 2 * kLanes;
  static float Widen(uint16_t x) { return Bits<float>(uint32_t{x} << 16); }
  static void Add(Floats& sum, const uint16_t* x, Words w) {
    __m512bh pairs = Bits<__m512bh>(Load<Words>(x));
    sum = Bits<Floats>(_mm512_dpbf16_ps(Bits<__m512>(sum), pairs, Bits<__m512bh>(w)));
  }
  static Words Read(const uint16_t* w) { return Load<Words>(w); }
  static void Split(const uint16_t* from, Floats* to) { SplitWords(Load<Words>(from), to); }
  static const uint16_t* Rows(const uint16_t* x, int64_t, int64_t, std::vector<float>&) {
    return x;
  }
};
#else
using BF16 = Widened;
#endif

// R rows of x with N rows of w: the sums go to y[R][N], whose rows are `out` apart. Every sum is
// added up in U parts, so that no addition waits for the one before it.
template <int R, int N, int U, typename T>
void Block(const typename T::Row* x, const typename T::Stored* w, float* y, int64_t in,
           int64_t out) {
  Floats sum[R][N][U] = {};
  int64_t i = 0;
  auto step = [&](int u) __attribute__((always_inline)) {
    int64_t k = i + u * T::kStep;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const typename T::Stored* from = w + n * in + k;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
      auto column = T::Read(from);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) T::Add(sum[r][n][u], x + r * in + k, column);
    }
  };
  for (; i + U * T::kStep <= in; i += U * T::kStep) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) step(u);
  }
  for (; i + T::kStep <= in; i += T::kStep) step(0);
  constexpr int kSums = R * N, kWhole = (kSums + kLanes - 1) / kLanes * kLanes;
  Floats each[kWhole] = {};
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      each[r * N + n] = sum[r][n][0];
      for (int u = 1; u < U; ++u) each[r * N + n] += sum[r][n][u];
    }
  }
  float totals[kWhole];
  if (kSums * 2 <= kLanes) {
    for (int n = 0; n < kSums; ++n) totals[n] = Sum(each[n]);
  } else {
    for (int first = 0; first < kWhole; first += kLanes) {
      SumEach(each + first);
      std::memcpy(totals + first, each + first, sizeof(Floats));
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      float total = totals[r * N + n];
      for (int64_t k = i; k < in; ++k) total += T::Widen(x[r * in + k]) * T::Widen(w[n * in + k]);
      y[r * out + n] = total;
    }
  }
}

// N outputs of all rows, a few at a time, while their weights are in the cache.
template <int N, typename T>
void Outputs(const typename T::Row* x, const typename T::Stored* w, float* y, int64_t rows,
             int64_t in, int64_t out) {
  for (; rows > 0; rows -= kMostRows, x += kMostRows * in, y += kMostRows * out) {
    switch (std::min<int64_t>(rows, kMostRows)) {
      case 1: Block<1, N, 4, T>(x, w, y, in, out); break;
      case 2: Block<2, N, 1, T>(x, w, y, in, out); break;
      case 3: Block<3, N, 1, T>(x, w, y, in, out); break;
      case 4: Block<4, N, 1, T>(x, w, y, in, out); break;
#if defined(__AVX512F__)
      case 5: Block<5, N, 1, T>(x, w, y, in, out); break;
      case 6: Block<6, N, 1, T>(x, w, y, in, out); break;
      case 7: Block<7, N, 1, T>(x, w, y, in, out); break;
      case 8: Block<8, N, 1, T>(x, w, y, in, out); break;
#endif
    }
  }
}

template <typename T>
void Range(const typename T::Row* x, const typename T::Stored* w, float* y, int64_t rows,
           int64_t in, int64_t out, int64_t first, int64_t last) {
  // One row is read in one stream; more share what they read of x.
  int64_t o = first;
  if (rows > 1) {
    for (; o + kBeside <= last; o += kBeside) Outputs<kBeside, T>(x, w + o * in, y + o, rows, in, out);
  }
  for (; o < last; ++o) Outputs<1, T>(x, w + o * in, y + o, rows, in, out);
}

// Numbers below `count` that are still to be worked on, by whoever takes them.
struct Queue {
  const std::function<void(int64_t)>* work;
  int64_t count;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  void Take() {
    for (int64_t n; (n = next.fetch_add(1)) < count;) {
      (*work)(n);
      if (done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }
};

// The queues of all calls of a kind that are running. Devices share the processors, and one may be slower; who
// is done with its own part would only wait for the others at the next sum, so it helps them.
struct Board {
  std::mutex mutex;
  std::vector<std::shared_ptr<Queue>> queues;

  void Add(const std::shared_ptr<Queue>& queue) {
    std::lock_guard<std::mutex> lock(mutex);
    queues.push_back(queue);
  }
  void Remove(const std::shared_ptr<Queue>& queue) {
    std::lock_guard<std::mutex> lock(mutex);
    queues.erase(std::find(queues.begin(), queues.end(), queue));
  }
  std::shared_ptr<Queue> Unfinished() {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto& queue : queues) {
      if (queue->next.load() < queue->count) return queue;
    }
    return nullptr;
  }
};

// Calls `work` with every number below `count`, on up to `threads` threads and those of other calls.
// Whoever waits for the last call waits only for threads that are at work, never for a task that has
// not begun; so a task that begins late finds nothing to do, and may find it after this has returned.
inline void InParallel(xla::ffi::ThreadPool& pool, int64_t threads, int64_t count,
                       const std::function<void(int64_t)>& work) {
  static Board board;
  auto queue = std::make_shared<Queue>();
  queue->work = &work, queue->count = count;
  board.Add(queue);
  int64_t helpers = std::min({threads, pool.num_threads(), count}) - 1;
  for (int64_t n = 0; n < helpers; ++n) pool.Schedule([queue] { queue->Take(); });
  queue->Take();
  while (auto other = board.Unfinished()) other->Take();
  std::unique_lock<std::mutex> lock(queue->mutex);
  queue->finished.wait(lock, [&] { return queue->done.load() == queue->count; });
  lock.unlock();
  board.Remove(queue);
}

}  // namespace
