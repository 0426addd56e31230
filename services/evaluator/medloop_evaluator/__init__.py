"""The evaluator: judges model versions, keeps the gate and signs approvals. Runs without torch."""
