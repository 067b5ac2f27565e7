"""A run from settings to result.

sharding.py weights and states cut over processes
build.py settings -> Run | start.py the weights it starts from | denoisers.py policy and reference, made from them
run.py a run in progress | state.py what its checkpoint holds
checkpoint.py checkpoints on disk | loop.py what surrounds the updates | optimizer.py the update
release.py the update made inside backward | graph.py a micro-step as a CUDA graph
waiting.py the wait for data | metrics.py an update's figures | trackers.py where figures are written | validation.py held-out accuracy
flops.py counted FLOPs | memory.py bytes and FLOPs, counted as tensors come and go | cost.py what a run computes | folder.py the output folder
samples.py sample images | results.py the trained weights | published.py texts without the places of the user's files | summary.py what the pages read
best.py the best weights so far | choice.py which become the result
judging.py the result against its start | rescue.py what is kept of updates that did not come to their end
parallel.py the processes of a run | agreement.py whether they agree
preparing.py the work of the prepare command | stored.py what a run takes from a store
outset.py its loss before the first update | strength.py what changes its strength from update to update
deterministic.py the same bits on a GPU too
embedded.py the embedded world where no model or data is named
"""
