// What the products of gate and up cost when nothing else happens: the loop of resident_linear.cuh (run_even_blocks, MXFP4, two strips a warp)
// over pages of 26 KB, without epilogues, hops and routing. Prints cycles a page, and what an mma.sync takes of a scheduler alone.
//
//   nvcc -gencode arch=compute_90a,code=sm_90a -O3 -std=c++17 -I.. -o product_loop product_loop.cu && ./product_loop
//
// Weights and activations are arbitrary bits. One GPU, a CTA on each multiprocessor; sums go to memory so that nothing is left out.
#include <algorithm>
#include <cstdio>
#include <cuda_runtime.h>
#include <vector>
#include "strips.cuh"
#include "ring.cuh"

// A page of gate and up of MiMo-V2.5-Pro: 6 blocks of 4 strips; K is 6144.
static const int STRIPS = 4, PAGE_BLOCKS = 6, BLOCKS = 48, BLOCK = STRIPS * StripFp4::BYTES;
static_assert(PAGE_BLOCKS * BLOCK == PAGE_BYTES, "a page is full");
static const int X_BYTES = BLOCKS * BLOCK_COLUMNS * TOKENS * 2, FACTOR_BYTES = BLOCKS * 4 * TOKENS * 4, SHARED = X_BYTES + FACTOR_BYTES + RING_STAGES * PAGE_BYTES + 2 * RING_STAGES * 8;
enum Ring { STILL, TURNING, LOADED };  // pages stay as they are; are waited for and given back, without copies; are copied, from L2

// WARPS consumer warps and, of a ring that turns, a loader lane for each stage, as in resident.cuh.
template <Ring RING, int WARPS> __global__ void __launch_bounds__(WARPS * 32 + 128, 1) product_loop(long long* cycles, float* sums, const uint8_t* weights, int pages) {
  uint8_t *x = dev::smem(), *ring = x + X_BYTES + FACTOR_BYTES; uint64_t *full = (uint64_t*)(ring + RING_STAGES * PAGE_BYTES), *empty = full + RING_STAGES;
  for (int i = threadIdx.x; i < (X_BYTES + FACTOR_BYTES) / 4; i += blockDim.x) ((uint32_t*)x)[i] = i < X_BYTES / 4 ? 0x38003A00u ^ (i & 0x3FF) : 0x3F800000u;
  for (int i = threadIdx.x; i < RING_STAGES * PAGE_BYTES / 4; i += blockDim.x) ((uint32_t*)ring)[i] = 0x77777777u ^ (i & 0x8888);
  if (threadIdx.x == 0) for (int k = 0; k < RING_STAGES; k++) { dev::mbar_init(&full[k], 1); dev::mbar_init(&empty[k], WARPS); }
  dev::mbar_init_fence();
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp - WARPS;
  if (own >= 0) {
    if constexpr (RING != STILL) if (lane == 0) ROLLED for (int page = own, fill = 0; page < pages; page += RING_STAGES, fill++) {
      if (fill > 0) dev::mbar_wait(&empty[own], fill - 1);
      if (RING == TURNING) { dev::mbar_arrive(&full[own]); continue; }
      dev::mbar_expect(&full[own], PAGE_BYTES);
      dev::bulk_load(ring + own * PAGE_BYTES, weights + (uint64_t)((page * gridDim.x + blockIdx.x) % 512) * PAGE_BYTES, PAGE_BYTES, &full[own], false);
    }
    return;
  }
  const int share = warp / 2 % PAGE_BLOCKS, at = share * BLOCK + warp % 2 * 2 * StripFp4::BYTES;
  float acc[2][4] = {}; Cursor c;
  const long long begin = clock64();
  ROLLED for (int page = 0; page < pages; page++, c.next(RING_STAGES)) {
    const int block = page * PAGE_BLOCKS % BLOCKS + share;
    Operand<TOKENS> o; o.lane = lane; o.x = x + lane * 16 + block * BLOCK_COLUMNS * x_column_bytes(TOKENS); o.factors = (const float*)(x + X_BYTES) + lane % 4 * 2 + block * 4 * TOKENS;
    if (RING != STILL) dev::mbar_wait(&full[c.stage], c.fill);
    StripFp4::Piece pieces[2][StripFp4::PIECES];
    UNROLL for (int k = 0; k < 2; k++) UNROLL for (int j = 0; j < StripFp4::PIECES; j++) pieces[k][j] = StripFp4::load(ring + c.stage * PAGE_BYTES + at + k * StripFp4::BYTES, j, lane);
    if (RING != STILL) page_read(&empty[c.stage]);
    StripFp4::add<2>(o, pieces, acc);
  }
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
  float sum = 0.0f;
  UNROLL for (int n = 0; n < 8; n++) sum += acc[n / 4][n % 4];
  sums[blockIdx.x * WARPS * 32 + threadIdx.x] = sum;
}
// Products alone: each warp has 16 sums of its own.
__global__ void __launch_bounds__(384, 1) products(long long* cycles, float* sums, int rounds) {
  float d[16][4] = {}; const uint32_t t = threadIdx.x, a[4] = {t, t * 3, t * 5, t * 7};
  const long long begin = clock64();
  ROLLED for (int n = 0; n < rounds; n++) UNROLL for (int k = 0; k < 16; k++) dev::mma16h(d[k], a, t * 11, t * 13);
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
  float sum = 0.0f;
  UNROLL for (int n = 0; n < 64; n++) sum += d[n / 4][n % 4];
  sums[blockIdx.x * 384 + threadIdx.x] = sum;
}

static long long* cycles; static float* sums; static uint8_t* weights; static int grid;
static double median_cta() {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) { fprintf(stderr, "product_loop: %s\n", cudaGetErrorString(error)); exit(1); }
  std::vector<long long> all(grid);
  cudaMemcpy(all.data(), cycles, grid * sizeof all[0], cudaMemcpyDeviceToHost);
  std::nth_element(all.begin(), all.begin() + grid / 2, all.end());
  return (double)all[grid / 2];
}
template <Ring RING, int WARPS> static void time_loop(const char* what) {
  const int pages = 4000;
  cudaFuncSetAttribute(product_loop<RING, WARPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
  for (int turn = 0; turn < 2; turn++) product_loop<RING, WARPS><<<grid, WARPS * 32 + 128, SHARED>>>(cycles, sums, weights, pages);
  printf("%-55s %2d warps: %6.0f cycles a page\n", what, WARPS, median_cta() / pages);
}
int main() {
  cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, 0) != cudaSuccess) { fprintf(stderr, "product_loop: no GPU\n"); return 1; }
  grid = p.multiProcessorCount;
  cudaMalloc(&cycles, grid * sizeof *cycles); cudaMalloc(&sums, grid * 384 * sizeof *sums); cudaMalloc(&weights, 512ull * PAGE_BYTES); cudaMemset(weights, 0x77, 512ull * PAGE_BYTES);
  time_loop<STILL, 4>("pages stay, two strip-blocks a warp (a third of a page)");
  time_loop<STILL, 8>("the same (two thirds)");
  time_loop<STILL, 12>("the same (a whole page)");
  time_loop<TURNING, 12>("pages waited for and given back, no copies");
  time_loop<LOADED, 12>("pages copied from L2");
  for (int turn = 0; turn < 2; turn++) products<<<grid, 384>>>(cycles, sums, 4000);
  printf("mma.sync m16n8k16 f16 alone, 3 warps a scheduler: %.2f cycles each\n", median_cta() / (4000 * 16 * 3));
}
