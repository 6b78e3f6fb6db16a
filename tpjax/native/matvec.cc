// Products of a few rows with a matrix stored [out, in], for XLA on a CPU: y[R,O] = x[R,I] w[O,I]^T
// in float32, of bfloat16 or float32 operands.
//
// With few rows a product is as fast as its weights are read. They are read one after the other, one
// or a few rows of the matrix at a time, once for up to eight rows of x, into accumulators that stay in
// registers. Vectors are the compiler's: as wide as the machine it builds for has them; and where it
// has an instruction that multiplies bfloat16, that is used.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

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
constexpr int64_t kChunk = 64;     // outputs one thread takes at a time
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

// How a matrix is stored; how x is held beside it, as `Row`s; and how kStep products of the two are
// added up.
struct F32 {
  using Stored = float;
  using Row = float;
  static constexpr int64_t kStep = kLanes;
  static float Widen(float x) { return x; }
  static void Add(Floats& sum, const float* x, Floats w) { sum += Load<Floats>(x) * w; }
  static Floats Read(const float* w) { return Load<Floats>(w); }
  static const float* Rows(const float* x, int64_t, int64_t, std::vector<float>&) { return x; }
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
  static const uint16_t* Rows(const uint16_t* x, int64_t, int64_t, std::vector<float>&) {
    return x;
  }
};
#else
// A word of two bfloat16 numbers is the second of them once its lower half is cleared, and the first
// once it is shifted; so x is sorted, of every vector the even places first.
struct BF16 {
  using Stored = uint16_t;
  using Row = float;
  static constexpr int64_t kStep = 2 * kLanes;
  static float Widen(uint16_t x) { return Bits<float>(uint32_t{x} << 16); }
  static float Widen(float x) { return x; }
  static void Add(Floats& sum, const float* x, Words w) {
    sum += Load<Floats>(x) * Bits<Floats>(w << 16);
    sum += Load<Floats>(x + kLanes) * Bits<Floats>(w & 0xffff0000u);
  }
  static Words Read(const uint16_t* w) { return Load<Words>(w); }
  static const float* Rows(const uint16_t* x, int64_t rows, int64_t in,
                           std::vector<float>& sorted) {
    sorted.resize(rows * in);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < in; ++k) {
        int64_t place = k % kStep, start = k - place;
        bool tail = start + kStep > in;
        int64_t at = tail ? k : start + place % 2 * kLanes + place / 2;
        sorted[r * in + at] = Widen(x[r * in + k]);
      }
    }
    return sorted.data();
  }
};
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
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      Floats all = sum[r][n][0];
      for (int u = 1; u < U; ++u) all += sum[r][n][u];
      float total = Sum(all);
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

// Chunks of outputs that threads take until none is left. Whoever waits for the last of them waits
// only for threads that are at work, never for a task that has not begun.
template <typename T>
struct Work {
  const typename T::Row* x;
  const typename T::Stored* w;
  float* y;
  int64_t rows, in, out, chunks;
  std::vector<float> sorted;  // x, where it is held in another order
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  void TakeChunks() {
    for (int64_t n; (n = next.fetch_add(1)) < chunks;) {
      Range<T>(x, w, y, rows, in, out, n * kChunk, std::min(out, (n + 1) * kChunk));
      if (done.fetch_add(1) + 1 == chunks) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }
};

template <typename T>
ffi::Error Run(ffi::ThreadPool& pool, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
               float* y) {
  using Stored = typename T::Stored;
  auto work = std::make_shared<Work<T>>();
  work->rows = x.dimensions()[0], work->in = x.dimensions()[1], work->out = w.dimensions()[0];
  work->chunks = (work->out + kChunk - 1) / kChunk;
  work->w = static_cast<const Stored*>(w.untyped_data()), work->y = y;
  work->x = T::Rows(static_cast<const Stored*>(x.untyped_data()), work->rows, work->in, work->sorted);
  int64_t helpers = std::min({threads, pool.num_threads(), work->chunks}) - 1;
  for (int64_t n = 0; n < helpers; ++n) pool.Schedule([work] { work->TakeChunks(); });
  work->TakeChunks();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done.load() == work->chunks; });
  return ffi::Error::Success();
}

ffi::Error FewRows(ffi::ThreadPool pool, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                   ffi::ResultBuffer<ffi::F32> y) {
  auto xs = x.dimensions(), ws = w.dimensions();
  if (xs.size() != 2 || ws.size() != 2 || xs[1] != ws[1] ||
      x.element_type() != w.element_type()) {
    return ffi::Error::InvalidArgument("x[R,I] and w[O,I] of one dtype are multiplied");
  }
  switch (w.element_type()) {
    case ffi::DataType::F32: return Run<F32>(pool, threads, x, w, y->typed_data());
    case ffi::DataType::BF16: return Run<BF16>(pool, threads, x, w, y->typed_data());
    default: return ffi::Error::InvalidArgument("float32 or bfloat16 are multiplied");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tpjax_few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
