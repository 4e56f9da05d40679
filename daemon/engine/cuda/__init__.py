"""The CUDA engine. It imports nothing: torch and FlashInfer enter a process with the module that needs them.

kernels       the compiled kernels that a configuration needs, where they are stored, how FlashInfer loads them
compile       compiles them, also on a machine without a GPU
generate      child process in which FlashInfer writes the sources to compile
buckets       batch sizes with a CUDA graph, and the choice of one (pure)
arrays        a step plan as the arrays that FlashInfer and the graphs read
slots         index of each request in the device's arrays (pure)
staging       pinned host buffers, used in turn, and the events after which they are free
features      what this engine does not compute (pure)
ops           element-wise operations: FlashInfer's kernels and our own (append.cu, append.h), or torch on any device
attention     attention over the paged pool: FlashInfer's wrappers, or torch on any device
weights       the model's tensors on the device
experts       the mixture of experts of a layer, over ops and grouped products
model         the forward pass of a decoder over ops and attention
small_batch   the same for decodes of one to four rows, by our own products (gemv.cu, gemv.h)
forward       the passes of a step over the device's static buffers: decodes, chunks, or both in one
sampler       sampling: a kernel (sampler.cu, row.h, draw.h), or torch on any device
numa          keeps threads on the CPUs near the GPU
memory        number of KV blocks that fit on a device beside the model (pure)
graphs        capture and replay of decode steps, and the choice of the fastest path
decode_paths  the paths that can compute a bucket
device        checks of the device, and the choice of dtypes
runner        CudaRunner: launches a step, and collects its tokens one step later
"""
