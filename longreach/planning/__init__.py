"""What a deployment costs before it is built: bytes, nodes, FLOPs and time, by pure functions.

`shapes` reads a model's configuration, `memory` counts bytes, `prefill` FLOPs, `placement` nodes,
`decode` the time of a token, `table1` prints RetrievalAttention's Table 1 for any model; `plan`
puts them together. Only `measure` touches the machine. Nothing here imports torch or a service:
tests hold the formulas to the services' own code.
"""
