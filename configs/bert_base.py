"""BERT base (Devlin et al. 2018, arXiv 1810.04805): post-norm encoder, masked tokens, no next sentence.

  python scripts/train.py --config=configs/bert_base.py --config.data.text=corpus/ --workdir=runs/bert_base

12 layers, 12 heads, width 768, rows of 512 packed with documents. Expected loss: not known for your text.
Time: 1.5 days at 1 million tokens a second. Hardware: compiled, not run (benchmarks/compile_configs.py).
"""

from llm_jax.training.experiment import default_config


def get_config(arg=""):
    config = default_config(objective="mlm", tokenizer="sentencepiece", schedule="linear")
    config.steps = 1_000_000
    config.global_batch_size = 256
    config.steps_per_dispatch = 10
    config.data.text = ("corpus/",)
    config.data.sequence_length = 512
    config.data.validation_fraction = 0.005
    config.tokenizer.vocab_size = 30_522
    config.tokenizer.sample_lines = 2_000_000
    config.model.causal = False
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.model_dim = 768
    config.model.block = "postnorm"
    config.model.positions = "learnt"
    config.model.norm = "layernorm"
    config.model.embedding_norm = True
    config.model.activation = "gelu"
    config.model.biases = True
    config.model.dropout = 0.1
    config.model.init_std = 0.02
    config.model.scan_layers = False  # a GPU takes a quarter longer by a scan (docs/log.md)
    config.optimizer.learning_rate = 1e-4
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-6
    config.optimizer.weight_decay = 0.01
    config.schedule.warmup_steps = 10_000
    config.evaluation.every = 5000
    config.evaluation.batches = 40
    config.checkpoint.every = 5000
    config.samples.prompt = "The capital of France is <mask>."
    return config
