"""ModernBERT base (Warner et al. 2024, arXiv 2412.13663): pre-norm, rotary, GeGLU, two layers in three local.

  python scripts/train.py --config=configs/modernbert_base.py --config.data.text=corpus/ \\
      --workdir=runs/modernbert_base

22 layers, 12 heads, width 768, rows of 1,024 packed with documents, 30% masked. Local layers look 64 tokens
to either side. Expected loss: not known for your text. Time: 5.5 days at 1 million tokens a second. Hardware:
compiled, not run.
"""

from llm_jax.training.experiment import default_config


def get_config(arg=""):
    config = default_config(objective="mlm", tokenizer="sentencepiece", schedule="wsd")
    config.steps = 100_000
    config.global_batch_size = 4608
    config.accumulation = 36
    config.steps_per_dispatch = 10
    config.data.text = ("corpus/",)
    config.data.sequence_length = 1024
    config.data.validation_fraction = 0.005
    config.tokenizer.vocab_size = 50_368
    config.tokenizer.sample_lines = 2_000_000
    config.objective.mask_rate = 0.3
    config.model.causal = False
    config.model.num_layers = 22
    config.model.num_heads = 12
    config.model.model_dim = 768
    config.model.mlp_dim = 1152
    config.model.window = (0, 65, 65)
    config.model.rotary_base = 160_000.0
    config.model.rotary_local_base = 10_000.0
    config.model.norm = "layernorm"
    config.model.embedding_norm = True
    config.model.activation = "geglu"
    config.model.scan_layers = False  # a GPU takes a quarter longer by a scan (docs/log.md)
    config.optimizer.learning_rate = 8e-4
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-6
    config.optimizer.weight_decay = 1e-5
    config.schedule.warmup_steps = 3000
    config.evaluation.every = 2000
    config.evaluation.batches = 20
    config.checkpoint.every = 2000
    config.samples.prompt = "The capital of France is <mask>."
    return config
