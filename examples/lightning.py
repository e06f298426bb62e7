"""megabase's model and data under a Trainer of your own, with stock callbacks and loggers.

    python examples/lightning.py [STEPS] [DIRECTORY]

It trains a small Reformer on E. coli 536, keeps the checkpoint with the best validation loss, and stops when that no
longer falls. docs/lightning.md says what `megabase train` does beyond that.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from megabase.datamodules.datamodule import SequenceDataModule
from megabase.datamodules.prepare.run import prepare
from megabase.pipeline.config.load import load
from megabase.pipeline.training.module import PretrainModule

root = Path(__file__).resolve().parents[1]
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
output = Path(sys.argv[2]) if len(sys.argv) > 2 else root / "runs" / "lightning"
shards = output / "shards"
if not shards.exists():
    prepare([root / "examples" / "data" / "ecoli_536.fna.gz"], shards, valid="0.002", progress=False)

small = ["model.dim=64", "data.length=512"]
config = load(
    [root / "configs" / "demo.yaml"], [f"data.shards={shards}", f"trainer.max_steps={steps}", *small]
)
data = SequenceDataModule(config.data, config.run.seed)
config.model.vocab_size = data.index.alphabet.vocab_size

every = max(steps // 2, 1)
best = ModelCheckpoint(output / "checkpoints", monitor="valid/bits_per_base", filename="{step}")
trainer = pl.Trainer(
    max_steps=steps,
    accumulate_grad_batches=data.accumulation,  # data.global_batch windows in each step
    gradient_clip_val=config.optim.clip,
    val_check_interval=every * data.accumulation,
    check_val_every_n_epoch=None,  # the training data never ends, so there are no epochs
    log_every_n_steps=1,
    logger=CSVLogger(output, "logs"),
    callbacks=[best, EarlyStopping("valid/loss", patience=3), LearningRateMonitor("step")],
    devices=1,
)
trainer.fit(PretrainModule(config), datamodule=data)
print(
    f"train/loss {trainer.callback_metrics['train/loss']:.4f} nats per base after {trainer.global_step} steps"
)
print(f"valid/bits_per_base {best.best_model_score:.4f} in {best.best_model_path}")
