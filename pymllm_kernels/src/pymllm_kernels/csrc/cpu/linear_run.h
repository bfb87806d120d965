// y = act(rms_norm(x) W^T + bias) + residual over a packed weight: the passes over rows, tiles
// and reduction blocks that all formats share.
//
// A Format says how a weight is multiplied:
//   Sum                      float or int32_t, the type of a running sum
//   Note, notes              what a row's result needs beside its sums: `notes` of these a row
//   const PackedLinear& packed
//   int64_t panel_dwords     dwords of a prepared row
//   int64_t block_dwords     dwords of x in a reduction block
//   int64_t row_bytes(k)     bytes of a prepared row of k values
//   prepare(x, dst, k, note) a row in the form in which it is multiplied; returns where it lies: x,
//                            or dst, which may be x and has room for k values of bf16 as well as for
//                            the prepared row
//   few_tiles(rows)          neighbouring tiles, from a multiple of it on, that up to 12 rows meet
//                            at once
//   few(...)                 up to 12 rows and one or few_tiles(rows) whole tiles
//   multiply(...)            up to 12 of many rows and a block of one tile
//   finish(...)              the sums of one row and tile as floats
#pragma once

#include <algorithm>

#include "linear_multiply.h"
#include "rms_norm.h"
#include "scratch.h"
#include "team.h"
#include "transpose.h"

namespace pymllm {

// Rows handled per pass: their x block (768 x 1024 x 2 B = 1.5 MB) streams from L2 and L3, their
// sums (768 x 32 x 4 B = 96 KB) stay in L2.
constexpr int64_t kMaxRows = 64 * kRowTile;
// `rows` rows as tiles of at most 12 whose sizes differ by at most one: 13 rows are 7 + 6,
// not 12 + 1.
struct RowTiles {
    int64_t rows;
    int64_t count;
    explicit RowTiles(int64_t n) : rows(n), count((n + kRowTile - 1) / kRowTile) {}
    int64_t begin(int64_t i) const { return rows * i / count; }
    int size(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
};

// The memory of `rows` packed rows: `dwords` panels [panel_dwords][rows of the row tile], and
// the notes.
template <typename Format>
struct Panels {
    uint32_t* dwords;
    typename Format::Note* notes;
};

// Norm, then the format's own preparation, of one row.
template <typename Format>
const void* prepare_row(const Format& format, const LinearCall& call, int64_t row, bf16* dst,
                        typename Format::Note* note) {
    const bf16* x = call.x + row * call.ldx;
    if (call.norm != nullptr) {
        rms_norm_row(x, call.norm, call.eps, call.k, dst);
        x = dst;
    }
    return format.prepare(x, dst, call.k, note);
}

// Lays `rows` prepared rows out as [panel_dwords][rows], zero padded.
template <typename Format>
void pack_rows(const Format& format, const LinearCall& call, int64_t row0, int rows,
               Panels<Format> to) {
    thread_local Scratch scratch;
    const int64_t bytes = format.row_bytes(call.k);
    const int64_t room = std::max<int64_t>(call.k, (bytes + 1) / 2);
    auto* buffer = scratch.get<bf16>(kRowTile * room * sizeof(bf16));
    const void* source[kRowTile];
    for (int m = 0; m < rows; ++m) {
        source[m] = prepare_row(format, call, row0 + m, buffer + m * room,
                                to.notes + m * format.notes);
    }
    const __mmask16 mask = first_lanes(rows);
    for (int64_t d0 = 0; d0 < format.panel_dwords; d0 += kLanes) {
        __m512i block[16];
        for (int m = 0; m < kLanes; ++m) {
            block[m] = m < rows ? load_dwords(source[m], d0, bytes) : _mm512_setzero_si512();
        }
        transpose16(block);
        const int steps = static_cast<int>(std::min<int64_t>(kLanes, format.panel_dwords - d0));
        for (int i = 0; i < steps; ++i) {
            _mm512_mask_storeu_epi32(to.dwords + (d0 + i) * rows, mask, block[i]);
        }
    }
}

inline void write_columns(const PackedLinear& w, const LinearCall& call, int64_t row, int64_t n0,
                          __m512 v) {
    const __mmask16 mask = first_lanes(w.n_out - n0);
    if (mask == 0) return;
    if (call.residual != nullptr) {
        v = _mm512_add_ps(v, load_bf16(call.residual + row * call.ldr + n0, mask));
    }
    if (call.out_f32) {
        _mm512_mask_storeu_ps(static_cast<float*>(call.out) + row * w.n_out + n0, mask, v);
    } else {
        store_bf16(static_cast<bf16*>(call.out) + row * w.n_out + n0, v, mask);
    }
}

// Bias, activation, residual and the single rounding for one row of tile `t`.
template <typename Format>
void finish_row(const Format& format, const LinearCall& call, int64_t row, int64_t t,
                const typename Format::Sum* sums, const typename Format::Note* note) {
    const PackedLinear& w = format.packed;
    __m512 y[kTileVecs];
    format.finish(sums, note, t, y);
    if (w.bias != nullptr) {
        for (int v = 0; v < kTileVecs; ++v) {
            y[v] = _mm512_add_ps(y[v], _mm512_loadu_ps(w.bias + t * kTileCols + v * kLanes));
        }
    }
    if (w.act == kActSiluMul) {
        write_columns(w, call, row, t * kLanes, _mm512_mul_ps(silu_ps(y[0]), y[1]));
    } else {
        write_columns(w, call, row, t * kTileCols, y[0]);
        write_columns(w, call, row, t * kTileCols + kLanes, y[1]);
    }
}

// Requests the lines of the result that rows [begin, end) of tile `t` will write: the rows lie far
// apart, and without this each store would wait for its line.
inline void prefetch_result(const PackedLinear& w, const LinearCall& call, int64_t begin,
                            int64_t end, int64_t t) {
    const int64_t width = call.out_f32 ? sizeof(float) : sizeof(bf16);
    const int64_t columns = w.act == kActSiluMul ? kLanes : kTileCols;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * w.n_out + t * columns;
        __builtin_prefetch(static_cast<char*>(call.out) + at * width, 1);
        if (call.residual != nullptr) {
            __builtin_prefetch(call.residual + row * call.ldr + t * columns);
        }
    }
}

// One weight tile against `rows.rows` packed rows starting at row0 of the result. sums:
// [rows][32].
template <typename Format>
void tile_against_rows(const Format& format, const LinearCall& call, int64_t row0,
                       const RowTiles& rows, Panels<Format> panels, int64_t t,
                       typename Format::Sum* sums) {
    const PackedLinear& w = format.packed;
    for (int64_t d0 = 0; d0 < format.panel_dwords; d0 += format.block_dwords) {
        const int64_t steps = std::min(format.block_dwords, format.panel_dwords - d0);
        const bool last = d0 + steps == format.panel_dwords;
        for (int64_t i = 0; i < rows.count; ++i) {
            const int64_t begin = rows.begin(i), end = rows.begin(i + 1);
            const int64_t size = end - begin;
            const uint32_t* panel = panels.dwords + begin * format.panel_dwords + d0 * size;
            if (last) prefetch_result(w, call, row0 + begin, row0 + end, t);
            format.multiply(i == 0, static_cast<int>(size), panel,
                            panels.notes + begin * format.notes, t, d0, steps,
                            sums + begin * kTileCols);
            for (int64_t m = begin; last && m < end; ++m) {
                finish_row(format, call, row0 + m, t, sums + m * kTileCols,
                           panels.notes + m * format.notes);
            }
        }
    }
}

// Up to 12 rows: every thread prepares x for itself (cheaper than a barrier) and streams its share
// of the weight once.
template <typename Format>
void few_rows(const Format& format, const LinearCall& call, Range tiles, Panels<Format> panels) {
    const int rows = static_cast<int>(call.m);
    const uint32_t* panel = panels.dwords;
    const int64_t bytes = format.row_bytes(call.k);
    if (rows == 1 && bytes == 4 * format.panel_dwords) {
        thread_local Scratch scratch;
        auto* buffer = scratch.get<bf16>(std::max<int64_t>(2 * call.k, bytes));
        panel =
            static_cast<const uint32_t*>(prepare_row(format, call, 0, buffer, panels.notes));
    } else {
        pack_rows(format, call, 0, rows, panels);
    }
    // [tiles][rows][32]; the more rows, the fewer tiles at once.
    alignas(64) typename Format::Sum sums[kRowTile * kTileCols];
    int at_once;
    for (int64_t t = tiles.begin; t < tiles.end; t += at_once) {
        at_once = Format::few_tiles(rows);
        if (t % at_once != 0 || t + at_once > tiles.end) at_once = 1;
        format.few(rows, at_once, panel, panels.notes, t, sums);
        for (int i = 0; i < at_once * rows; ++i) {
            finish_row(format, call, i % rows, t + i / rows, sums + i * kTileCols,
                       panels.notes + i % rows * format.notes);
        }
    }
}

template <typename Format>
Panels<Format> panels_for(const Format& format, int64_t rows, Scratch& dwords, Scratch& notes) {
    return {dwords.get<uint32_t>(rows * format.panel_dwords * sizeof(uint32_t)),
            notes.get<typename Format::Note>(rows * format.notes *
                                             sizeof(typename Format::Note))};
}

template <typename Format>
void run_linear(const Format& format, const LinearCall& call, int threads) {
    using Sum = typename Format::Sum;
    const int64_t tiles = format.packed.tiles;
    if (call.m <= 0) return;
    if (call.m <= kRowTile) {
        auto body = [&](int rank, int size) {
            thread_local Scratch dwords, notes;
            few_rows(format, call, share(tiles, rank, size),
                     panels_for(format, call.m, dwords, notes));
        };
        parallel(threads, body);
        return;
    }
    const int64_t passes = (call.m + kMaxRows - 1) / kMaxRows;
    const int64_t pass_rows = (call.m + passes - 1) / passes;
    thread_local Scratch dwords, notes;
    const Panels<Format> panels = panels_for(format, pass_rows, dwords, notes);
    auto body = [&](int rank, int size) {
        thread_local Scratch scratch;
        auto* sums = scratch.get<Sum>(pass_rows * kTileCols * sizeof(Sum));
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t row0 = call.m * pass / passes;
            const RowTiles rows(call.m * (pass + 1) / passes - row0);
            const Range pack = share(rows.count, rank, size);
            for (int64_t i = pack.begin; i < pack.end; ++i) {
                const int64_t begin = rows.begin(i);
                pack_rows(format, call, row0 + begin, rows.size(i),
                          {panels.dwords + begin * format.panel_dwords,
                           panels.notes + begin * format.notes});
            }
            barrier(size);
            const Range mine = share(tiles, rank, size);
            for (int64_t t = mine.begin; t < mine.end; ++t) {
                tile_against_rows(format, call, row0, rows, panels, t, sums);
            }
            barrier(size);  // the next pass overwrites the panels
        }
    };
    parallel(threads, body);
}

}  // namespace pymllm
