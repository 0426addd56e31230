"""What can be said about the manifests without a cluster: `make k8s-check`, or `python -m k8s.check`.

Every overlay, and every component on top of one, is rendered; then schemas are checked (`schema`), what a Pod must have
(`pods`), that what is named exists (`references`), and who may speak to whom (`arrows`).
"""
