"""What a coordinator does with the Kubernetes API: elect a leader, hear of pods, size the nodes.

All of it is optional and none of it on the token path. While the API does not answer, generations
go on, members are judged by their heartbeats and the number of nodes stays what it is.
"""
