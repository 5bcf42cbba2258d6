"""`ftrain train TASK --model DIR --data FILE`: train a model that exists on data that exists."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tyro.conf import OmitArgPrefixes

import ftrain
from ftrain import lora, optim
from ftrain.cli.config_file import as_config
from ftrain.data.encoding import ChatEncoder, Length
from ftrain.run import folder as run_folder
from ftrain.run.data import TaskData, make_data
from ftrain.run.folder import RunFolder
from ftrain.run.progress import Report, SteadyConsole
from ftrain.run.ranks import MeshFlags, is_main, of_main
from ftrain.run.recipe import Recipe, optimizer
from ftrain.run.session import Run, session
from ftrain.run.training import Every, Training, train
from ftrain.run.trackers import TRACKERS, require_trackers
from ftrain.tasks import Dpo, Kd, Kto, NextToken
