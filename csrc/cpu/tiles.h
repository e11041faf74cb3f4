// The tile shapes compiled for every instruction set whose registers hold them.
#pragma once

namespace smart::cpu {

struct Tile {
  int rows, cols;  // vectors
};

// Of equally good ones the first wins, so longer runs of pixels come first. Eight sums keep two FMA ports busy for the
// four cycles an FMA takes; more of them share the cost of reading a non-zero, and the edges of what a tile reads.
constexpr Tile kTiles[] = {{1, 16}, {2, 8}, {4, 4}, {2, 7}, {1, 12}, {2, 6}, {3, 4}, {2, 5}, {3, 3}, {1, 8}, {1, 7},
                           {1, 6},  {1, 5}, {2, 4}, {4, 2}, {8, 1},  {1, 4}, {2, 2}, {4, 1}, {1, 3}, {1, 2}, {1, 1}};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

}  // namespace smart::cpu
