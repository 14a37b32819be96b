"""Bad inputs: command, arguments, and what the message must name. tests/test_bad_input.py runs them."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import nn

from maml_pipeline.tasks import Lines, Split, Task
from tests.helpers import CONFIGS

SHORT = (
    *("--trainer.max_steps", "3", "--trainer.val_check_interval", "2"),
    *("--data.val_tasks", "2", "--data.test_tasks", "2", "--trainer.enable_progress_bar", "false"),
)
TOY = ("--config", str(CONFIGS / "toy.yaml"), *SHORT)
IMAGES = ("--config", "images.yaml", *SHORT)
LISTS = (
    *("--data.tasks.split_sizes", "null", "--data.tasks.train_classes", "names.txt"),
    *("--data.tasks.val_classes", "[c,d]", "--data.tasks.test_classes", "[e,f]"),
)
OMNIGLOT = ("--config", str(CONFIGS / "omniglot" / "5way_1shot.yaml"), *SHORT)


class UnpicklableLines(Lines):
    """Tasks that cannot be sent to a worker process."""

    def __init__(self, shots: int = 5, query_shots: int = 10) -> None:
        super().__init__(shots, query_shots)
        self.shift = lambda value: value


class FailingLines(Lines):
    """Tasks that raise an error when drawn."""

    def task(self, seed: int, split: Split, index: int) -> Task:
        """Fail."""
        raise ZeroDivisionError("no line here")


class FailingNetwork(nn.Linear):
    """A network that cannot be built."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        raise KeyError("no network here")


NAMED_BY_THE_CLASS = {
    "model.network.in_features": "network",
    "model.network.out_features": "network",
    "data.tasks.shots": "Lines",
    "data.tasks.query_shots": "Lines",
}
"""Keys that only the class validates, whose message need not name them."""


class Row(NamedTuple):
    """A bad input.

    Args:
        arguments: The arguments of `maml`.
        names: Text that the message must contain.
    """

    arguments: tuple[str, ...]
    names: str


KEYS = {
    "seed_everything": "null -1 4294967296 99999999999999999999999",
    "run.experiment": "../out /abs a/../../b ''",
    "run.dir": "/proc/run binary.yaml '' .",
    "run.checkpoint_every": "0 -1",
    "run.monitor": "val/accuracy nope null ''",
    "run.mode": "sideways null ''",
    "run.artifacts": "maybe [1]",
    "run.varied": "model.inner_lr {a:1} [1] [model.nope] [model.optimizer.lr] [data.tasks] [model]",
    "probes.every": "0 -1",
    "ckpt_path": "nowhere.ckpt folder binary.yaml empty.yaml best last ''",
    "model.network": "null os.system torch.nn.functional.relu maml_pipeline.networks.Nope",
    "model.network.in_features": "null -1 0 2 99999999999999999999 1000000000000",
    "model.network.out_features": "null -1 0 2 99999999999999999999",
    "model.loss": "null os.getcwd torch.nn.functional.nope",
    "model.metric": "nope [1]",
    "model.inner_lr": "null 0 -0.1 nan inf -inf",
    "model.inner_steps": "-1 10001 1000000000000 null",
    "model.eval_inner_steps": "-1 10001 1000000000000 x 1.5",
    "model.learned_inner_lr.lr": "0 -1 nan x null",
    "model.adapt": "x [] [nope.*] [1] [weight,nope]",
    "model.first_order_meta_steps": "-1",
    "model.differentiated_steps": "-1 2 1.5 x",
    "model.method": "null checkpoint hessian-free",
    "model.engine": "higher null ''",
    "model.tasks_per_chunk": "0 -1 x 1.5",
    "model.optimizer": "null torch.optim.SparseAdam torch.optim.Nope torch.nn.Linear",
    "model.optimizer.lr": "null -1 nan [1]",
    "model.optimizer.betas": "null [1] [2,2]",
    "model.optimizer.eps": "null -1",
    "model.optimizer.weight_decay": "null -1",
    "model.optimizer.capturable": "true",
    "model.optimizer.differentiable": "true",
    "model.lr_scheduler": "nope [1] 1.5 torch.optim.lr_scheduler.StepLR torch.nn.Linear",
    "data.tasks": "null nope torch.nn.Linear",
    "data.tasks.shots": "null 100000000000 99999999999999999999",
    "data.tasks.query_shots": "100000000000",
    "data.meta_batch_size": "0 -1 null 1000000000000",
    "data.val_tasks": "0 -1 100000000000000",
    "data.test_tasks": "0 -1 100000000000000",
    "data.num_workers": "-1 257 100000",
    "trainer.accelerator": "tpu hpu mps gpu nope null ''",
    "trainer.devices": "-1 0 [0,1] [] 3 1.5 x null ''",
    "trainer.num_nodes": "0 -1 2 8",
    "trainer.strategy": "fsdp deepspeed ddp_spawn ddp_fork ddp_notebook nope null ''",
    "trainer.precision": "12 x [1]",
    "trainer.logger": "false nope [1] TensorBoardLogger CSVLogger",
    "trainer.callbacks": "nope [1] 1.5 EarlyStopping torch.nn.Linear",
    "trainer.fast_dev_run": "true 3 -1",
    "trainer.max_epochs": "0 -2 x",
    "trainer.min_epochs": "1 -1 x",
    "trainer.max_steps": "-2 null",
    "trainer.min_steps": "1 -1 x",
    "trainer.max_time": "x -1 [1] 1:2",
    "trainer.limit_train_batches": "0 -1 99999999999999999999 x",
    "trainer.limit_val_batches": "-1 1.5 x",
    "trainer.limit_test_batches": "0 -1 1.5 x",
    "trainer.limit_predict_batches": "1 x",
    "trainer.overfit_batches": "1 0.5 -1 x",
    "trainer.val_check_interval": "0 -1 0.5 00:00:01:00 {minutes:1} x null",
    "trainer.check_val_every_n_epoch": "0 -1 x",
    "trainer.num_sanity_val_steps": "-2 x",
    "trainer.log_every_n_steps": "-1 x",
    "trainer.enable_checkpointing": "false",
    "trainer.accumulate_grad_batches": "0 -1 99999999999999999999 null",
    "trainer.gradient_clip_val": "-1 nan x",
    "trainer.gradient_clip_algorithm": "nope",
    "trainer.deterministic": "x",
    "trainer.benchmark": "x",
    "trainer.profiler": "nope",
    "trainer.barebones": "true",
    "trainer.plugins": "nope [1]",
    "trainer.reload_dataloaders_every_n_epochs": "1 -1",
    "trainer.default_root_dir": "elsewhere",
    "trainer.model_registry": "mine",
}
"""Invalid values of `maml fit`'s keys, beside those of a type that differs from the default's."""

FIT = """\
inner_rate: --model.inner_rate 1
nothing: --nothing 3
stray: stray
inner_lr: --model.inner_lr
model: --model 3
shout: --model.shout 1
shots: --data.tasks.shots 0
shots: --data.tasks.shots -1
query_shots: --data.tasks.query_shots 0
steps: --trainer {"max_steps":"x"}
binary.yaml: --config binary.yaml
empty.yaml: --config empty.yaml
list.yaml: --config list.yaml
text.yaml: --config text.yaml
broken.yaml: --config broken.yaml
tabs.yaml: --config tabs.yaml
inner_lr: --config duplicate.yaml
inner_rate: --config unknown.yaml
seed_everything: --config seed.yaml
folder: --config folder
missing.yaml: --config missing.yaml
toyy: --config toyy
config: --config ''
/proc/self/mem: --config /proc/self/mem
/dev/null: --config /dev/null
BackboneFinetuning: --trainer.callbacks+=BackboneFinetuning
GradientAccumulationScheduler: --trainer.callbacks+=GradientAccumulationScheduler \
--trainer.callbacks.scheduling {"1":2}
StochasticWeightAveraging: --trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs 1
WeightAveraging: --trainer.callbacks+=WeightAveraging
LearningRateFinder: --trainer.callbacks+=LearningRateFinder
BatchSizeFinder: --trainer.callbacks+=BatchSizeFinder
TQDMProgressBar: --trainer.callbacks+=TQDMProgressBar
RichProgressBar: --trainer.callbacks+=RichProgressBar
val/nope: --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val/nope
val/nope: --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor val/nope
limit_val_batches is 0: --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val/loss \
--trainer.limit_val_batches 0
val_check_interval: --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val/loss \
--trainer.val_check_interval 4
val_check_interval: --model.lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau \
--trainer.val_check_interval 4
patience: --trainer.callbacks+=EarlyStopping --trainer.callbacks.patience x
check_on_train_epoch_end: --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val/loss \
--trainer.callbacks.check_on_train_epoch_end true
interval: --trainer.callbacks+=Timer --trainer.callbacks.interval epoch
duration: --trainer.callbacks+=Timer --trainer.callbacks.duration x
total_steps: --model.lr_scheduler torch.optim.lr_scheduler.OneCycleLR --model.lr_scheduler.max_lr 1 \
--model.lr_scheduler.total_steps 2
lr_scheduler: --model.lr_scheduler torch.optim.lr_scheduler.OneCycleLR --model.lr_scheduler.max_lr 1
lr_scheduler: --model.lr_scheduler torch.optim.lr_scheduler.StepLR --model.lr_scheduler.step_size 0
factor: --model.lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau --model.lr_scheduler.factor 2
val/nope: --model.lr_scheduler pytorch_lightning.cli.ReduceLROnPlateau \
--model.lr_scheduler.monitor val/nope
train/loss: --model.lr_scheduler pytorch_lightning.cli.ReduceLROnPlateau \
--model.lr_scheduler.monitor train/loss
network: --model.network maml_pipeline.networks.MLP --model.network.hidden_features [-1]
hidden_features: --model.network maml_pipeline.networks.MLP --model.network.hidden_features x
network: --model.network torch.nn.Linear --model.network.in_features 1000000000 \
--model.network.out_features 1000000000
Dropout: --model.network torch.nn.Dropout
no network here: --model.network tests.bad_inputs.FailingNetwork
no line here: --data.tasks tests.bad_inputs.FailingLines
num_workers: --data.tasks tests.bad_inputs.UnpicklableLines --data.num_workers 2
model.compile is no longer needed: --model.compile true
tasks_per_chunk: --model.tasks_per_chunk 8 --model.engine learn2learn
tasks_per_chunk: --model.tasks_per_chunk auto --model.engine learn2learn
dirpath: --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.dirpath [1]
last.ckpt: --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.save_last true
best.ckpt: --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename best
optimizer: --model.optimizer torch.optim.LBFGS --model.learned_inner_lr.lr 0.001
learned_inner_lr.lr 0.001: --model.lr_scheduler torch.optim.lr_scheduler.CyclicLR \
--model.lr_scheduler.base_lr 0.1 --model.lr_scheduler.max_lr 0.2 --model.learned_inner_lr.lr 0.001
learned_inner_lr.lr 0.001: --model.lr_scheduler torch.optim.lr_scheduler.OneCycleLR \
--model.lr_scheduler.max_lr 0.1 --model.lr_scheduler.total_steps 500 --model.learned_inner_lr.lr 0.001
"""

COMMANDS = """\
seeds: tradeoff TOY --seeds 4294967296
seeds: tradeoff TOY --seeds 99999999999999999999999
seeds: tradeoff TOY --seeds -1
seeds: tradeoff TOY --seeds x
seeds: tradeoff TOY --seeds ''
seeds: tradeoff TOY --seeds 0,0
orders: tradeoff TOY --orders ''
orders: tradeoff TOY --orders ,
orders: tradeoff TOY --orders third
orders: tradeoff TOY --orders first,first
inner_steps: tradeoff TOY --inner_steps -1
inner_steps: tradeoff TOY --inner_steps 1.5
inner_steps: tradeoff TOY --inner_steps 1000000000000
out: tradeoff TOY --out ''
out: tradeoff TOY --out binary.yaml
out: tradeoff TOY --out /proc/out
config.yaml: tradeoff TOY --out damaged
config.yaml: tradeoff TOY --out damaged --dry_run
config.yaml: tradeoff TOY --out incomplete
another folder: tradeoff TOY --out other
out: tradeoff TOY --report
nowhere.json: tradeoff --submitted nowhere.json --report
binary.yaml: tradeoff --submitted binary.yaml --cell 0
submitted: submit --tradeoff --dry_run TOY --submitted nowhere.json
cell: tradeoff TOY --cell 99
cell: tradeoff TOY --cell -1
cell: tradeoff TOY --cell x
cell: tradeoff TOY --cell 0 --report
parallel: tradeoff TOY --parallel 0
parallel: tradeoff TOY --parallel -1
parallel: tradeoff TOY --parallel 1.5
parallel: tradeoff TOY --parallel ''
parallel: tradeoff TOY --parallel many
CPU core: tradeoff TOY --parallel 9999999
CPU core: tradeoff TOY --parallel 9999999 --dry_run
trainer.devices: tradeoff TOY --parallel 2 --trainer.devices 2
trainer.num_nodes: tradeoff TOY --parallel 2 --trainer.num_nodes 2
parallel: tradeoff TOY --parallel 2 --cell 0
parallel: tradeoff TOY --parallel 2 --report
parallel: submit --tradeoff --dry_run TOY --parallel 2
run.dir: tradeoff TOY --run.dir x
seed_everything: tradeoff TOY --seed_everything 1
first_order: tradeoff TOY --model.first_order true
ckpt_path is not used: tradeoff TOY --ckpt_path last
ckpt_path is not used: tradeoff TOY --config resumes.yaml
ckpt_path is not used: submit --dry_run --tradeoff TOY --config resumes.yaml
max_steps: tradeoff TOY --trainer.max_steps -1
vary: tradeoff TOY --vary
vary: tradeoff TOY --vary ''
vary: tradeoff TOY --vary model.inner_lr
vary: tradeoff TOY --vary =1
inner_lr: tradeoff TOY --vary model.inner_lr=
inner_lr: tradeoff TOY --vary model.inner_lr=0.1,,0.2
inner_lr: tradeoff TOY --vary model.inner_lr=0.1,x
inner_lr is -1.0: tradeoff TOY --vary model.inner_lr=0.1,-1
inner_lr is nan: tradeoff TOY --vary model.inner_lr=nan
inner_lr 0.1 more than once: tradeoff TOY --vary model.inner_lr=0.1,0.10
did you mean --model.inner_lr: tradeoff TOY --vary model.inner_rate=0.1
more than once: tradeoff TOY --vary model.inner_lr=0.1 --vary model.inner_lr=0.2
leave one of them out: tradeoff TOY --vary model.inner_lr=0.1,0.2 --model.inner_lr 0.1
meta_batch_size: tradeoff TOY --vary model.inner_lr=0.1 --vary data.meta_batch_size=4,0
model: tradeoff TOY --vary model=1
use --seeds: tradeoff TOY --vary seed_everything=0,1
orders contains truncated: tradeoff TOY --orders truncated
orders contains truncated--1: tradeoff TOY --orders truncated--1
inner_steps has 1; leave one of them out: tradeoff TOY --orders truncated-2 --inner_steps 1,2
model.method: fit TOY --model.first_order true --model.method checkpointed
model.differentiated_steps: fit TOY --model.first_order true --model.differentiated_steps 1
model.method now, with the value checkpointed: fit TOY --model.checkpoint_inner_steps true
model.first_order_meta_steps now: fit TOY --model.first_order_steps 3
use --orders: tradeoff TOY --vary model.first_order=true,false
use --orders: tradeoff TOY --vary model.method=unrolled,checkpointed
use --orders: tradeoff TOY --vary model.differentiated_steps=0,1
use --inner_steps: tradeoff TOY --vary model.inner_steps=1,2
use --out: tradeoff TOY --vary run.dir=a,b
trainer.logger: tradeoff TOY --vary trainer.logger=CSVLogger
trainer.max_steps: tradeoff TOY --vary trainer.max_steps=1,2
run.varied: tradeoff TOY --vary run.varied=x
data.tasks.shots: tradeoff TOY --vary data.tasks.shots=1,5
eval_inner_steps: tradeoff TOY --vary model.eval_inner_steps=1,5
ckpt_path: tradeoff TOY --vary ckpt_path=last
inner_lr is -1.0: submit --dry_run --tradeoff TOY --vary model.inner_lr=-1
best_of: tradeoff TOY --best_of
best_of missing: tradeoff TOY --best_of missing
leave one of them out: tradeoff TOY --best_of x --vary model.inner_lr=0.1,0.2
missing.yaml: tradeoff --config missing.yaml
no config: tradeoff
num_nodes: submit --dry_run TOY --trainer.num_nodes 0
num_nodes: submit --dry_run TOY --trainer.num_nodes -1
num_nodes: submit --dry_run --tradeoff TOY --trainer.num_nodes 0
devices: submit --dry_run TOY --trainer.devices 0
devices: submit --dry_run TOY --trainer.devices []
accelerator: submit --dry_run TOY --trainer.accelerator tpu
strategy: submit --dry_run TOY --trainer.strategy fsdp
--nodes: submit --dry_run TOY -- --nodes=2
--gres: submit --dry_run TOY -- --gres=gpu:2
--gres: submit --dry_run TOY -- --gres gpu:2
--array: submit --dry_run TOY -- --array=1-2
stray: submit --dry_run TOY -- stray
--cell: submit --dry_run --tradeoff TOY --cell 0
nope: submit --dry_run TOY --nope
seeds: submit --dry_run --tradeoff TOY --seeds 4294967296
sbatch: submit TOY
missing.yaml: submit --dry_run --config missing.yaml
w0: derive --w0 MANY
w0: derive --w0 x
w0: derive --w0 ''
w0: derive --w0 []
w0: derive --w0 [[1]]
w0: derive --w0 1e400
w0: derive --w0 {}
w0: derive --w0 [1,2]
b0: derive --b0 [1,2]
support_x: derive --support_x [[1],[1,2]]
query_x: derive --query_x x
query_y: derive --query_y [1,2]
inner_steps: derive --inner_steps -1
inner_steps: derive --inner_steps x
inner_steps: derive --inner_steps 100000000
inner_lr: derive --inner_lr x
inner_lr: derive --inner_lr -1
outer_lr: derive --outer_lr 0
seed: derive --seed -1
seed: derive --seed 99999999999999999999999
dtype: derive --dtype float16
first_order: derive --first_order maybe
graph: derive --graph x.pdf
graph: derive --graph /proc/x.svg
graph: derive --graph ''
nope: derive --nope
runs: runs
nope: runs nope
folder: runs folder --json
binary.yaml: runs binary.yaml
list.yaml: runs list.yaml
PATH: runs ''
--filter: runs folder --filter k
--filter: runs folder --filter ''
--filter: runs folder --filter =5
--sort: runs folder --sort ''
--sort: runs folder --sort k,,seed
--sort: runs folder --sort
--nope: runs folder --nope
RUN_DIR: report
nope: report nope
folder: report folder
binary.yaml: report binary.yaml
list.yaml: report list.yaml
'': report ''
/proc/self/mem: report /proc/self/mem
out: report folder --out ''
--nope: report folder --nope
RUN_DIR: export
OUT: export folder
folder: export folder net.pt
nope: export nope net.pt
binary.yaml: export binary.yaml net.pt
net.onnx: export folder net.onnx
safetensors: export folder net
OUT: export folder ''
RUN_DIR: export '' net.pt
--which: export folder net.pt --which first
--which: export folder net.pt --which
--nope: export folder net.pt --nope
RUN_DIR: sync
nope: sync nope
folder: sync folder
binary.yaml: sync binary.yaml
RUN_DIR: sync ''
--project: sync folder --project
--config: prepare
truncated/d/1.png: fit IMAGES --data.tasks.dataset.root truncated
'c' in the: fit IMAGES --data.tasks.dataset.root few
no picture/b/0.png: fit IMAGES --data.tasks.dataset.root 'no picture'
Couldn't find any class folder: fit IMAGES --data.tasks.dataset.root folder
nowhere: fit IMAGES --data.tasks.dataset.root nowhere
ways is 3; it must be at most 2: fit IMAGES --data.tasks.ways 3 --model.network.ways 3
split_sizes: fit IMAGES --data.tasks.split_sizes [3,3,3]
split_sizes: fit IMAGES --data.tasks.split_sizes [3,3]
split_sizes: fit IMAGES --data.tasks.split_sizes [0.6,0.3,0.2]
split_sizes: fit IMAGES --data.tasks.split_sizes [0.98,0.01,0.01]
split_sizes: fit IMAGES --data.tasks.split_sizes x
image_size: fit IMAGES --model.network.image_size 8
no split of the classes: fit IMAGES --data.tasks.split_sizes null
more than one split: fit IMAGES --data.tasks.train_classes names.txt
val_classes: fit IMAGES --data.tasks.split_sizes null --data.tasks.train_classes names.txt
did you mean 'f': fit IMAGES LISTS --data.tasks.test_classes [e,F]
as train_classes does: fit IMAGES LISTS --data.tasks.val_classes [b,d]
missing.txt: fit IMAGES LISTS --data.tasks.train_classes missing.txt
binary.yaml: fit IMAGES LISTS --data.tasks.train_classes binary.yaml
query_shots: fit IMAGES --data.tasks.query_shots 3
channels: fit IMAGES --data.tasks.channels 2
image_size: fit IMAGES --data.tasks.image_size 0
image_size: fit IMAGES --data.tasks.image_size 100000000
rotated_splits: fit IMAGES --data.tasks.rotated_splits [valid]
cache_dir: fit IMAGES --data.tasks.cache_dir /proc/x
trian: fit IMAGES --data.tasks.pool [{trian:true}]
pool: fit IMAGES --data.tasks.pool []
torchvision.datasets.CIFAR100: fit IMAGES --data.tasks.dataset torchvision.datasets.CIFAR1000
Dataset: fit IMAGES --data.tasks.dataset torch.nn.Linear
dataset: fit IMAGES --data.tasks.dataset null
Dataset not found: fit IMAGES --data.tasks.dataset torchvision.datasets.CIFAR100
did you mean root: fit IMAGES --data.tasks.dataset.roott x
3 channels: fit IMAGES --model.network.in_channels 1
OnlyImages: fit IMAGES --data.tasks.dataset tests.test_image_tasks.OnlyImages
nope: prepare nope
binary.yaml: prepare omniglot --root binary.yaml
/proc/x: prepare omniglot --root /proc/x
root: prepare omniglot --root ''
cache_dir: prepare omniglot --cache_dir ''
--root: prepare omniglot --root
--entity: dashboard
--project: dashboard --entity me
inner_steps: dashboard --entity me --project mine --inner_steps -1
inner_steps: dashboard --entity me --project mine --inner_steps x
W&B: dashboard --entity me --project mine
nope: nope
COMMAND: --nope
COMMAND: ''
last.ckpt: test TOY --ckpt_path last
best.ckpt: test TOY --ckpt_path best
best.ckpt: validate TOY --ckpt_path best
nowhere.ckpt: test TOY --ckpt_path nowhere.ckpt
binary.yaml: validate TOY --ckpt_path binary.yaml
missing.yaml: test --config missing.yaml
no config: test
no config: fit
no config: validate
val_tasks: validate TOY --data.val_tasks 0
test_tasks: test TOY --data.test_tasks 0
devices: test TOY --trainer.devices [0,1]
devices: validate TOY --trainer.devices -1
strategy: test TOY --trainer.strategy nope
accelerator: validate TOY --trainer.accelerator nope
limit_test_batches: test TOY --trainer.limit_test_batches 0
ways: fit OMNIGLOT --data.tasks.ways 3
ways: fit OMNIGLOT --model.network.ways 7
ways: fit OMNIGLOT --data.tasks.ways 1
ways: fit OMNIGLOT --data.tasks.ways 101 --model.network.ways 101
shots: fit OMNIGLOT --data.tasks.shots 20
rotated_splits: fit OMNIGLOT --data.tasks.rotated_splits [x]
split_sizes: fit OMNIGLOT --data.tasks.split_sizes [1200,423]
split_sizes: fit OMNIGLOT --data.tasks.split_sizes [1200,0,423]
split_sizes: fit OMNIGLOT --data.tasks.split_sizes [1200,100,423]
filters: fit OMNIGLOT --model.network.filters 0
downsampling: fit OMNIGLOT --model.network.downsampling nope
"""

WRONG_TYPES: dict[type, str] = {
    bool: "x [1] -1 ''",
    int: "x [1] 1.5 '' {\"a\":1}",
    float: 'x [1] {"a":1}',
}


IMAGES_CONFIG = """
model:
  network: {class_path: maml_pipeline.networks.ConvNet, init_args: {ways: 2, in_channels: 3, filters: 4}}
  loss: torch.nn.functional.cross_entropy
  inner_lr: 0.1
data:
  tasks:
    class_path: maml_pipeline.tasks.ImageTasks
    init_args:
      image_size: 28
      dataset: {class_path: torchvision.datasets.ImageFolder, init_args: {root: pictures}}
      split_sizes: [2, 2, 2]
      ways: 2
      query_shots: 1
      cache_dir: ../cache
  meta_batch_size: 2
trainer: {accelerator: cpu}
"""
"""A config of image tasks; the cache is outside of the folder in which nothing may be left."""


def write_inputs(folder: Path) -> None:
    """Write the files that the rows name."""
    (folder / "folder").mkdir()
    (folder / "binary.yaml").write_bytes(bytes(range(256)) * 4)
    for name, text in {
        "empty.yaml": "",
        "list.yaml": "- 1\n- 2\n",
        "text.yaml": "hello",
        "broken.yaml": "a: [1,\nb: }",
        "tabs.yaml": "model:\n\tinner_lr: 1\n",
        "duplicate.yaml": "model:\n  inner_lr: 1\n  inner_lr: 2\n",
        "unknown.yaml": "model:\n  inner_rate: 1\n",
        "seed.yaml": "data: {seed: 5}\n",
        "resumes.yaml": "ckpt_path: last\n",
        "damaged/config.yaml": "model: {inner_steps: 1\n",
        "incomplete/config.yaml": "run: 1\n",
        "images.yaml": IMAGES_CONFIG,
        "names.txt": "a\nb\n",
        "other/config.yaml": "model: {eval_inner_steps: 3}\n",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("pictures", "truncated", "few", "no picture"):
        for letter in "abcdef":
            for number in range(3):
                file = folder / name / letter / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (9, 9), (40 * number, ord(letter), 0)).save(file)
    damaged = folder / "truncated" / "d" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:45])
    (folder / "few" / "c" / "1.png").unlink()
    (folder / "few" / "c" / "2.png").unlink()
    (folder / "no picture" / "b" / "0.png").write_text("no picture")


def rows(config: dict[str, Any]) -> list[Row]:
    """Return the whole table.

    Args:
        config: A resolved configuration; each of its keys is also given values of wrong types.
    """
    found = [*_of_types(config), *_of_ranges()]
    for line in FIT.splitlines():
        names, _, arguments = line.partition(": ")
        found.append(Row(("fit", *TOY, *_words(arguments)), names))
    for line in COMMANDS.splitlines():
        names, _, arguments = line.partition(": ")
        found.append(Row(tuple(_words(arguments)), names.strip("'")))
    return list(dict.fromkeys(found))


def _of_ranges() -> Iterator[Row]:
    for key, values in KEYS.items():
        for value in shlex.split(values):
            names = NAMED_BY_THE_CLASS.get(key, key.rpartition(".")[2])
            yield Row(("fit", *TOY, f"--{key}={value}"), names)


def _of_types(config: dict[str, Any], prefix: str = "") -> Iterator[Row]:
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _of_types(
                value.get("init_args", {}) if "class_path" in value else value, f"{key}."
            )
        for wrong in shlex.split(WRONG_TYPES.get(type(value), "")):
            yield Row(("fit", *TOY, f"--{key}={wrong}"), name)


def _words(arguments: str) -> Iterator[str]:
    known = {
        "TOY": TOY,
        "OMNIGLOT": OMNIGLOT,
        "IMAGES": IMAGES,
        "LISTS": LISTS,
        "MANY": ("[" * 500 + "]" * 500,),
    }
    for word in shlex.split(arguments, posix=True) if "{" not in arguments else arguments.split():
        yield from known.get(word, (word,))
