"""``sisa serve``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sisa.cli.options import store_option
from sisa.errors import UserError


@click.command()
@store_option
@click.option("--host", default="127.0.0.1", show_default=True, metavar="HOST", help="Where to listen.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--lease", "lease_s", default=2.0, show_default=True, type=click.FloatRange(0.2, 60.0), metavar="SECONDS",
              help="How long this replica may answer without reading the ledger; a deletion waits so long for a dead one.")  # fmt: skip
@click.option("--open-prediction", is_flag=True, help="Predictions need no token.")
@click.option("--no-repair", is_flag=True, help="Leave the retraining after deletions to `sisa repair`.")
@click.option("--rate", type=click.FloatRange(0.001), metavar="PER_SECOND", help="Most requests per second of a token.")
@click.option("--max-rows", default=100_000, show_default=True, type=click.IntRange(1), help="Most rows of a request.")
@click.option("--max-megabytes", default=16, show_default=True, type=click.IntRange(1), help="Largest body, in MiB.")
@click.option("--max-seconds", default=60.0, show_default=True, type=click.FloatRange(0.1), help="Longest request.")
@click.option(
    "--tls-certificate", type=click.Path(), metavar="FILE", help="PEM; with --tls-key the server speaks HTTPS."
)
@click.option("--tls-key", type=click.Path(), metavar="FILE", help="PEM, the certificate's private key.")
@click.option(
    "--replicas",
    type=click.IntRange(1),
    metavar="N",
    help="Answer from N processes, behind Ray Serve; 1 with --address.",
)
@click.option(
    "--address",
    metavar="RAY",
    help="Answer, and retrain, on a running Ray cluster: head:6379, or auto; see --replicas.",
)
def serve(
    store: str,
    host: str,
    port: int,
    lease_s: float,
    open_prediction: bool,
    no_repair: bool,
    rate: float | None,
    max_rows: int,
    max_megabytes: int,
    max_seconds: float,
    tls_certificate: str | None,
    tls_key: str | None,
    replicas: int | None,
    address: str | None,
) -> None:
    r"""Serve predictions, deletions and the operator's page over HTTP.

    Everything but health (and, with --open-prediction, predictions) needs a token: `sisa token create`.
    A deletion is acknowledged when no replica of the store answers any more with what the rows left
    behind. Stop it with Ctrl-C: running requests end first.

    \b
    Examples:
      sisa token create --store runs/adult --scope predict,delete,read
      sisa serve --store runs/adult
      sisa serve --store runs/adult --replicas 4
      sisa serve --store runs/adult --replicas 4 --address auto
      curl -H "Authorization: Bearer $TOKEN" -d '{"rows": [{"age": 41}]}' \
           -H "Content-Type: application/json" http://127.0.0.1:8080/predict
    """
    from sisa.remote import locate
    from sisa.serving.app import Serving

    if bool(tls_certificate) != bool(tls_key):
        raise UserError("--tls-certificate and --tls-key belong together", hint="Give both, or neither.")
    sys.path.insert(0, str(Path.cwd()))
    serving = Serving(
        layout=locate(store),
        lease_s=lease_s,
        open_prediction=open_prediction,
        repairs=not no_repair,
        address=address,
        rate_per_second=rate,
        max_rows=max_rows,
        max_bytes=max_megabytes * 2**20,
        max_seconds=max_seconds,
    )
    tls = (tls_certificate, tls_key) if tls_certificate and tls_key else None
    if replicas is None and address is None:
        from sisa.serving.server import run

        run(serving, host=host, port=port, tls=tls)
    else:
        from sisa.serving.rayserve import run as run_replicas

        run_replicas(serving, replicas=replicas or 1, host=host, port=port, tls=tls)
