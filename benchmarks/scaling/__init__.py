"""How many pods, nodes and dollars a rate of predictions takes, and what bursts do to it.

Everything is computed from figures that stand elsewhere: processor time from the tables of benchmarks/README.md, sizes
from the code that makes records, the autoscaler's settings and the pod's size from the manifests, the door and the
batch size by the service's own classes. What nobody here can measure stands in `assumptions`.
"""
