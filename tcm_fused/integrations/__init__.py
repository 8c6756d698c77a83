"""The loss in the libraries that people train with. Each module needs its library, and none is imported by `tcm_fused`.

pytorch_metric_learning   a loss for its miners, wrappers and trainers, and its `CrossBatchMemory` for it
sentence_transformers     a loss for its trainer, and `WithTCM`, which adds TCM to any of its losses
lightning, transformers   callbacks that log hard pairs while training, and OPIS at validation
"""
