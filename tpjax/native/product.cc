// Products with a matrix stored [out, in], for XLA on a CPU: y[R,O] = x[R,I] w[O,I]^T in float32, of
// bfloat16 or float32 operands, or of float32 and a matrix of bfloat16, widened on the way.
//
// A few rows are as fast as the matrix is read (rows.h). For many, where the processor multiplies
// bfloat16 itself, a panel of outputs is brought into an order in which a pair of x meets sixteen
// outputs, once, and eight rows of sums at a time stay in registers.

#include "rows.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kChunk = 64;  // outputs one thread takes at a time

#if defined(__AVX512BF16__)
constexpr int kPanel = 3;       // vectors of outputs
constexpr int64_t kPairs = 16;  // of inputs, that are one vector
constexpr int64_t kPairsAhead = 64;
constexpr int64_t kFew = 32;  // rows for which bringing a panel into order takes longer than it saves

// Sixteen rows of sixteen words: columns become rows.
inline void Transpose(Words* x) {
#define TPJAX_SWAP(step)                                                         \
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; ++i) {                        \
    if (i & step) continue;                                                      \
    Words a = x[i], b = x[i + step];                                             \
    x[i] = __builtin_shufflevector(a, b, TPJAX_LOW##step);                       \
    x[i + step] = __builtin_shufflevector(a, b, TPJAX_HIGH##step);               \
  }
  TPJAX_SWAP(1) TPJAX_SWAP(2) TPJAX_SWAP(4) TPJAX_SWAP(8)
}

// 16 V rows of the matrix as panel[in / 2][16 V], a pair of inputs in each word.
template <int V>
void Pack(const uint16_t* w, int64_t in, uint32_t* panel) {
  for (int64_t k = 0; k < in / 2; k += kPairs) {
    for (int v = 0; v < V; ++v) {
      Words x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const uint16_t* from = w + (v * 16 + i) * in + 2 * k;
        __builtin_prefetch(from + 2 * kPairsAhead);
        x[i] = Load<Words>(from);
      }
      Transpose(x);
      for (int i = 0; i < 16; ++i) std::memcpy(panel + ((k + i) * V + v) * 16, &x[i], 64);
    }
  }
}

// R rows of x with a panel.
template <int R, int V>
void Tile(const uint16_t* x, const uint32_t* panel, float* y, int64_t in, int64_t out) {
  Floats sum[R][V] = {};
  for (int64_t k = 0; k < in / 2; ++k) {
    Words column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) column[v] = Load<Words>(panel + (k * V + v) * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      auto pair = Bits<__m512bh>(Words{} + Load<uint32_t>(x + r * in + 2 * k));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        auto both = Bits<__m512bh>(column[v]);
        sum[r][v] = Bits<Floats>(_mm512_dpbf16_ps(Bits<__m512>(sum[r][v]), pair, both));
      }
    }
  }
  for (int r = 0; r < R; ++r) std::memcpy(y + r * out, sum[r], sizeof(sum[r]));
}

// All rows with 16 V outputs.
template <int V>
void Panel(const uint16_t* x, const uint16_t* w, float* y, int64_t rows, int64_t in, int64_t out) {
  thread_local std::vector<uint32_t> room;
  room.resize(std::max<size_t>(room.size(), in / 2 * 16 * V + 16));
  auto panel = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
  Pack<V>(w, in, panel);
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) Tile<8, V>(x + r * in, panel, y + r * out, in, out);
  for (; r < rows; ++r) Tile<1, V>(x + r * in, panel, y + r * out, in, out);
}

// Outputs [first, last) of many rows.
void Many(const uint16_t* x, const uint16_t* w, float* y, int64_t rows, int64_t in, int64_t out,
          int64_t first, int64_t last) {
  int64_t o = first;
  if (in % (2 * kPairs) == 0) {
    for (; o + 16 * kPanel <= last; o += 16 * kPanel) {
      Panel<kPanel>(x, w + o * in, y + o, rows, in, out);
    }
    for (; o + 16 <= last; o += 16) Panel<1>(x, w + o * in, y + o, rows, in, out);
  }
  Range<BF16>(x, w, y, rows, in, out, o, last);
}
#endif

// T: how x, which comes as X, is held beside the matrix.
template <typename T, typename X>
ffi::Error Run(ffi::ThreadPool& pool, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
               float* y) {
  using Stored = typename T::Stored;
  int64_t rows = x.dimensions()[0], in = x.dimensions()[1], out = w.dimensions()[0];
  auto* matrix = static_cast<const Stored*>(w.untyped_data());
  auto in_chunks = [&](int64_t chunk, auto work) {
    InParallel(pool, threads, (out + chunk - 1) / chunk,
               [&](int64_t n) { work(n * chunk, std::min(out, (n + 1) * chunk)); });
  };
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BF16>) {
    if (rows > kFew) {
      auto* all = static_cast<const Stored*>(x.untyped_data());
      in_chunks(16 * kPanel, [&](int64_t first, int64_t last) {
        Many(all, matrix, y, rows, in, out, first, last);
      });
      return ffi::Error::Success();
    }
  }
#endif
  std::vector<float> sorted;
  auto* held = T::Rows(static_cast<const X*>(x.untyped_data()), rows, in, sorted);
  in_chunks(kChunk, [&](int64_t first, int64_t last) {
    Range<T>(held, matrix, y, rows, in, out, first, last);
  });
  return ffi::Error::Success();
}

ffi::Error Product(ffi::ThreadPool pool, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                   ffi::ResultBuffer<ffi::F32> y) {
  auto xs = x.dimensions(), ws = w.dimensions();
  if (xs.size() != 2 || ws.size() != 2 || xs[1] != ws[1]) {
    return ffi::Error::InvalidArgument("x[R,I] and w[O,I] are multiplied");
  }
  auto are = [&](ffi::DataType row, ffi::DataType matrix) {
    return x.element_type() == row && w.element_type() == matrix;
  };
  constexpr auto kWide = ffi::DataType::F32, kNarrow = ffi::DataType::BF16;
  float* to = y->typed_data();
  if (are(kWide, kWide)) return Run<F32, float>(pool, threads, x, w, to);
  if (are(kNarrow, kNarrow)) return Run<BF16, uint16_t>(pool, threads, x, w, to);
  if (are(kWide, kNarrow)) return Run<Widened, float>(pool, threads, x, w, to);
  return ffi::Error::InvalidArgument("float32 is multiplied, or bfloat16 with either");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tpjax_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// How many rows of bfloat16 are multiplied at most: as many as there are, or a few.
extern "C" int64_t tpjax_most_rows() {
#if defined(__AVX512BF16__)
  return INT64_MAX;
#else
  return kMostRows;
#endif
}
