// What selective_scan.cpp (the binding) and selective_scan.cu (the CUDA kernels) agree on: plain pointers and a stream,
// no torch.
#pragma once
#include <cstdint>

enum class ScanType : int { f32, bf16, f16 };

// The CPU and the CUDA implementation keep a state for the backward pass at the start of every CHUNK time steps.
constexpr int CHUNK = 64;

// Everything is contiguous and on the device of `stream`. Activations have the type `type`, the rest is fp32.
// Optional pointers may be null: D, h0, reset, y's checkpoints, dlast and the outputs that belong to an absent input.
struct ScanArgs {
  ScanType type;
  int64_t batch, T, channels, N;
  const void *u, *delta;             // (batch, T, channels)
  const float *A;                    // (channels, N)
  const void *B, *C;                 // (batch, T, N)
  const float *D, *h0;               // (channels), (batch, channels, N)
  const uint8_t *reset;              // (batch, T): nonzero where h_{t-1} counts as zero
  // forward writes these; backward reads checkpoints
  void *y;                           // (batch, T, channels)
  float *last;                       // (batch, channels, N): h after the last step
  float *checkpoints;                // (batch, ceil(T / CHUNK), N, channels): h before steps 0, CHUNK, 2 CHUNK, ...
  // backward
  const void *dy;                    // (batch, T, channels)
  const float *dlast;                // (batch, channels, N)
  void *du, *ddelta;                 // (batch, T, channels)
  float *dA, *dB, *dC, *dD, *dh0;    // fp32; (channels, N), (batch, T, N) twice, (channels), (batch, channels, N)
  void *workspace;                   // scan_backward_workspace(...) bytes
  void *stream;                      // cudaStream_t
};

// Each returns null, or the CUDA runtime's message if a launch failed.
const char *scan_forward_cuda(const ScanArgs &);
const char *scan_backward_cuda(const ScanArgs &);
int64_t scan_backward_workspace(int64_t batch, int64_t T, int64_t channels, int64_t N);
