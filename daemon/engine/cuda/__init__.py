"""The CUDA engine. Nothing is imported here: torch and FlashInfer enter a process with the module that needs them.

kernels     which compiled kernels a configuration needs, where they are kept, how FlashInfer loads them
compile     compiles them, also on a machine without a GPU
generate    the child process in which FlashInfer writes what is to be compiled
buckets     batch sizes that graphs are captured for, and the choice of one (pure)
arrays      a step plan as the arrays that FlashInfer and the graphs read
slots       the place of each request in the device's own arrays (pure)
staging     pinned host buffers in rotation, and the events that free them
ops         element-wise work: FlashInfer's kernels and one of ours (append.cu, append.h), or torch on any device
attention   attention over the paged pool: FlashInfer's wrappers, or torch on any device
weights     the model's tensors on its device
model       the Llama forward over ops and attention
few_rows    the same for decodes of one to four rows, by our own products (gemv.cu, gemv.h)
passes      the two passes of a step, decodes and chunks, over the device's static buffers
sampler     the draw: a kernel (sampler.cu, row.h, draw.h), or torch on any device
numa        keeps threads on the processors near the GPU
memory      how many KV blocks a device holds beside the model (pure)
graphs      capture and replay of decode steps, and the choice between ways to compute one
runner      CudaRunner: launches a step, collects its tokens one step later
"""
