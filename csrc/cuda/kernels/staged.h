// What    Moves tiles of a weight through shared memory, so that global memory sees only whole, neighbouring 16-byte
//         accesses whatever the group dim's stride is, and a thread can still have a whole group to itself.
// Layout  A tile is k x inner elements. `inner` runs along the dim of stride 1 where that is not the group dim:
//           line   group dim of stride 1: inner = 1, a tile is a piece of a row
//           flat   OIHW along I, and the like: k neighbours adjoin, a tile is one piece of k * inner elements
//           runs   a transposed matrix, and the like: a tile is k pieces of `inner` elements
//         In shared memory element (k, s) is number k * pitch + s; the chunks of a line are swizzled: see slot().
// Launch  One block per tile, in steps with a barrier after each: copy in, work, and, where the weight is written, copy
//         out. Each step is a plain function of the thread's number; the host tests run them one after the other.
#pragma once

#include <cstdint>
#include <optional>

#include "../../core/hd.h"
#include "chunk.h"
#include "layout.h"

namespace nms {

constexpr int kStagedThreads = 128;
// Eight such blocks, which every multiprocessor since sm_80 holds, have more loads in flight than its share of the
// memory bandwidth needs (about 30 KiB).
constexpr int kTileBytes = 16 << 10;
constexpr int kTileChunks = kTileBytes / kChunkBytes;

// Where chunk `index` of a line lies in shared memory. Threads read groups of 1, 2, 4 or 8 chunks, all at the same
// position of their group at once; the exclusive-or spreads those over the banks. A bijection within each 8 chunks.
// Elsewhere neighbouring threads read neighbouring elements, and chunks stay in their order.
NMS_HD int slot(int index) { return index ^ (index >> 3 & 7); }

// Elements along `inner` in a tile of runs: 256 bytes, long enough for full-speed bursts of DRAM.
template <class Bits>
constexpr int kRunElements = 256 / static_cast<int>(sizeof(Bits));

// How a weight is cut into tiles.
struct Tiles {
  Rows outer;         // the dims beside k and inner
  int64_t k, inner;   // extents of the weight
  int64_t a_k, b_k;   // strides of k: source and destination
  int64_t inner_row;  // row numbers between neighbours along inner
  int tile_k, tile_inner;
  Divisor k_tiles, inner_tiles;
  int pitch;       // elements from one k to the next in shared memory
  bool adjoining;  // ... and in global memory too: line and flat
  bool aligned;    // global memory allows 16-byte accesses

  NMS_HD int64_t count() const { return outer.count * inner_tiles.value() * k_tiles.value(); }
};

struct Tile {
  int64_t a, b;  // element offsets of its first element
  int64_t row;   // row number of inner position 0
  int64_t first_k;
  int k, inner;  // extents; smaller than tile_k and tile_inner at the ends
};

NMS_HD Tile tile_at(const Tiles& tiles, int64_t index) {
  const int64_t rest = tiles.k_tiles.quotient(index);
  const int64_t outer = tiles.inner_tiles.quotient(rest);
  const int64_t first_inner = (rest - outer * tiles.inner_tiles.value()) * tiles.tile_inner;
  const RowAt at = tiles.outer.at(outer);
  Tile tile;
  tile.first_k = (index - rest * tiles.k_tiles.value()) * tiles.tile_k;
  tile.k = static_cast<int>(tiles.k - tile.first_k < tiles.tile_k ? tiles.k - tile.first_k : tiles.tile_k);
  tile.inner =
      static_cast<int>(tiles.inner - first_inner < tiles.tile_inner ? tiles.inner - first_inner : tiles.tile_inner);
  tile.a = at.a + tile.first_k * tiles.a_k + first_inner;
  tile.b = at.b + tile.first_k * tiles.b_k + first_inner;
  tile.row = at.row + first_inner * tiles.inner_row;
  return tile;
}

// `count` neighbouring elements of a tile: where they lie, and how many of them exist.
struct Piece {
  int64_t a, b;  // element offsets from the tile's first element
  int valid;
};

template <class Bits>
NMS_HD Piece piece_at(const Tiles& tiles, const Tile& tile, int element, int count) {
  if (tiles.adjoining) {
    const int left = tile.k * tiles.pitch - element;
    return Piece{element, element, left < 0 ? 0 : left < count ? left : count};
  }
  const int k = element / kRunElements<Bits>;
  const int s = element % kRunElements<Bits>;
  const int left = k < tile.k ? tile.inner - s : 0;
  return Piece{k * tiles.a_k + s, k * tiles.b_k + s, left < 0 ? 0 : left < count ? left : count};
}

// The elements of the tile in shared memory.
template <class Bits>
class SharedTile {
 public:
  NMS_HD SharedTile(const Tiles& tiles, Chunk* chunks) : chunks_(chunks), swizzled_(tiles.pitch == 1) {}

  NMS_HD Chunk& chunk(int index) const { return chunks_[swizzled_ ? slot(index) : index]; }
  NMS_HD Bits& element(int index) const {
    constexpr int kElements = kChunkElements<Bits>;
    return reinterpret_cast<Bits*>(&chunk(index / kElements))[index % kElements];
  }

  // All elements in their order; not of a line.
  NMS_HD Bits* elements() const { return reinterpret_cast<Bits*>(chunks_); }

 private:
  Chunk* chunks_;  // [kTileChunks]
  bool swizzled_;
};

// Chunks of a tile that lie within one piece of global memory from its first element on.
template <class Bits>
NMS_HD int whole_chunks(const Tiles& tiles, const Tile& tile) {
  return tiles.adjoining && tiles.aligned ? tile.k * tiles.pitch / kChunkElements<Bits> : 0;
}

constexpr int kChunksPerThread = kTileChunks / kStagedThreads;
static_assert(kStagedThreads % 64 == 0, "a thread's chunks must all be swizzled the same way");

// First step: the tile into shared memory, and zeros behind its end up to a multiple of `unit` along k. Virtual zeros
// are what a short last group is defined to be followed by.
template <class Bits>
NMS_HD void copy_in(const Tiles& tiles, const Tile& tile, const Bits* src, int unit, Chunk* shared, int thread) {
  constexpr int kElements = kChunkElements<Bits>;
  const SharedTile<Bits> to(tiles, shared);
  const Bits* const from = src + tile.a;
  const int elements = round_up(tile.k, unit) * tiles.pitch;
  const int whole = whole_chunks<Bits>(tiles, tile);
  const Bits* const first = from + int64_t{thread} * kElements;
  Chunk* const first_to = &to.chunk(thread);
  NMS_UNROLL
  for (int i = 0; i < kChunksPerThread; ++i)
    if (thread + i * kStagedThreads < whole)
      copy_chunk_async(first_to + i * kStagedThreads, first + i * kStagedThreads * kElements);
  if (tiles.aligned) {
    const int chunks = (elements + kElements - 1) / kElements;
    NMS_KEEP_LOOP
    for (int c = whole + thread; c < chunks; c += kStagedThreads) {
      const Piece piece = piece_at<Bits>(tiles, tile, c * kElements, kElements);
      if (piece.valid == kElements) {
        copy_chunk_async(&to.chunk(c), from + piece.a);
      } else {
        to.chunk(c) = Chunk{};
        NMS_KEEP_LOOP
        for (int i = 0; i < piece.valid; ++i) to.element(c * kElements + i) = from[piece.a + i];
      }
    }
  } else {
    for (int e = thread; e < elements; e += kStagedThreads) {
      const Piece piece = piece_at<Bits>(tiles, tile, e, 1);
      to.element(e) = piece.valid ? from[piece.a] : Bits{0};
    }
  }
}

// Last step: the tile's own elements back to global memory.
template <class Bits>
NMS_HD void copy_out(const Tiles& tiles, const Tile& tile, Bits* dst, Chunk* shared, int thread) {
  constexpr int kElements = kChunkElements<Bits>;
  const SharedTile<Bits> from(tiles, shared);
  Bits* const to = dst + tile.b;
  const int elements = tile.k * tiles.pitch;
  const int whole = whole_chunks<Bits>(tiles, tile);
  Bits* const first = to + int64_t{thread} * kElements;
  const Chunk* const first_from = &from.chunk(thread);
  NMS_UNROLL
  for (int i = 0; i < kChunksPerThread; ++i)
    if (thread + i * kStagedThreads < whole)
      store_chunk(first + i * kStagedThreads * kElements, first_from[i * kStagedThreads]);
  if (tiles.aligned) {
    const int chunks = (elements + kElements - 1) / kElements;
    NMS_KEEP_LOOP
    for (int c = whole + thread; c < chunks; c += kStagedThreads) {
      const Piece piece = piece_at<Bits>(tiles, tile, c * kElements, kElements);
      if (piece.valid == kElements) {
        store_chunk(to + piece.b, from.chunk(c));
      } else {
        NMS_KEEP_LOOP
        for (int i = 0; i < piece.valid; ++i) to[piece.b + i] = from.element(c * kElements + i);
      }
    }
  } else {
    for (int e = thread; e < elements; e += kStagedThreads) {
      const Piece piece = piece_at<Bits>(tiles, tile, e, 1);
      if (piece.valid) to[piece.b] = from.element(e);
    }
  }
}

// One thread's work within a tile: `unit` weights along k at one inner position.
struct Unit {
  int first;    // its first element in shared memory; the next along k are pitch apart
  int k;        // position of that element along k, within the tile
  int64_t row;  // number of its row
  int len;      // weights that exist
};

NMS_HD int unit_count(const Tile& tile, int unit) { return divide_up(tile.k, unit) * tile.inner; }

NMS_HD Unit unit_at(const Tiles& tiles, const Tile& tile, int unit, int index) {
  const int number = tile.inner == 1 ? index : index / tile.inner;
  const int s = index - number * tile.inner;
  Unit found;
  found.k = number * unit;
  found.first = found.k * tiles.pitch + s;
  found.row = tile.row + s * tiles.inner_row;
  found.len = tile.k - found.k < unit ? tile.k - found.k : unit;
  return found;
}

// Tiles for a layout, with tile_k a multiple of `unit`; nothing where single elements of strided memory serve better:
// no dim of stride 1, or many rows that are each too short for a block.
template <class Bits>
std::optional<Tiles> make_tiles(const Layout& layout, int64_t unit, const void* a, const void* b) {
  constexpr int64_t kCapacity = kTileBytes / static_cast<int64_t>(sizeof(Bits));
  constexpr int64_t kElements = kChunkElements<Bits>;
  constexpr int64_t kEnoughTiles = 512;    // a few for each multiprocessor
  constexpr int64_t kSmallestTile = 2048;  // bytes; one chunk a thread
  constexpr int64_t kShortRow = 1024;      // bytes

  const Rows& rows = layout.rows;
  const bool line = layout.a_k == 1 && layout.b_k == 1;
  const bool inner_dim = !line && rows.dims > 0 && rows.a[0] == 1 && (!layout.has_b || rows.b[0] == 1);
  if (!line && !inner_dim) return std::nullopt;

  Tiles tiles;
  tiles.k = layout.k;
  tiles.inner = line ? 1 : rows.size[0].value();
  tiles.inner_row = line ? 0 : rows.row[0];
  tiles.outer = line ? rows : rows.outer();
  tiles.a_k = layout.a_k;
  tiles.b_k = layout.b_k;

  const int64_t step = std::lcm(unit, kElements);  // so that every tile begins at a multiple of a chunk
  const bool adjoining = line || (layout.a_k == tiles.inner && layout.b_k == tiles.inner);
  tiles.adjoining = adjoining && step * tiles.inner <= kCapacity;
  if (tiles.adjoining) {
    tiles.tile_inner = tiles.pitch = static_cast<int>(tiles.inner);
  } else {
    tiles.tile_inner = tiles.pitch = kRunElements<Bits>;
    if (tiles.inner * static_cast<int64_t>(sizeof(Bits)) < 32 || step * tiles.pitch > kCapacity) return std::nullopt;
  }
  if (tiles.adjoining && tiles.outer.count > kEnoughTiles &&
      tiles.k * tiles.inner * static_cast<int64_t>(sizeof(Bits)) < kShortRow)
    return std::nullopt;

  int64_t tile_k = kCapacity / tiles.pitch / step * step;
  const int64_t inner_tiles = divide_up(tiles.inner, tiles.tile_inner);
  while (tiles.outer.count * inner_tiles * divide_up(tiles.k, tile_k) < kEnoughTiles && tile_k / 2 >= step &&
         tile_k / 2 * tiles.pitch * static_cast<int64_t>(sizeof(Bits)) >= kSmallestTile)
    tile_k = round_up(tile_k / 2, step);
  tile_k = round_up(divide_up(tiles.k, divide_up(tiles.k, tile_k)), step);  // equal parts
  tiles.tile_k = static_cast<int>(tile_k);
  tiles.k_tiles = Divisor(divide_up(tiles.k, tile_k));
  tiles.inner_tiles = Divisor(inner_tiles);

  const auto in_chunks = [](int64_t elements) { return elements % kElements == 0; };
  tiles.aligned = is_aligned(a, kChunkBytes) && (b == nullptr || is_aligned(b, kChunkBytes));
  if (!tiles.adjoining) tiles.aligned = tiles.aligned && in_chunks(tiles.a_k) && in_chunks(tiles.b_k);
  for (int d = 0; d < tiles.outer.dims; ++d)
    tiles.aligned = tiles.aligned && in_chunks(tiles.outer.a[d]) && in_chunks(tiles.outer.b[d]);
  return tiles;
}

}  // namespace nms
