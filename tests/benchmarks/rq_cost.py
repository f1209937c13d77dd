"""RQ-Transformer against a flat GPT over the same codes:   python tests/benchmarks/rq_cost.py

8 x 8 places of 4 codes, width 512, 10 body and 2 head layers, batch 16, random weights. The flat one reads h w D tokens with all 12
layers, cached too. The bound counts steps of layers: (n_body + n_head) / (n_body / D + n_head); how much of it is reached is printed.
"""
import torch
from common import compare

from rqvae import RQVAE, Config, RQTransformer, Transformer, bind, sample

BATCH, PLACES, DEPTH, WIDTH, HEADS, BODY, HEAD, V = 16, 64, 4, 512, 8, 10, 2, 512


def main():
    torch.manual_seed(0)
    config = Config(image_size=32, ch_mult=(1, 1, 1), depth=DEPTH, codebook_size=V, width=WIDTH, heads=HEADS, body_layers=BODY,
                    head_layers=HEAD, disc_weight=0.0)
    tokenizer, prior = RQVAE(config).eval(), RQTransformer(config).eval()
    bind(prior, tokenizer)
    tokenizer.decode = lambda codes: codes.float()                      # the decoder is the same for both
    labels = torch.zeros(BATCH, dtype=torch.long)
    flat, embedding, head = Transformer(BODY + HEAD, WIDTH, HEADS).eval(), torch.nn.Embedding(V, WIDTH), torch.nn.Linear(WIDTH, V)

    @torch.no_grad()
    def flat_gpt():
        cache, token = flat.new_cache(PLACES * DEPTH), labels[:, None]
        for _ in range(PLACES * DEPTH):
            logits = head(flat(embedding(token), cache)[:, -1])
            token = torch.multinomial(logits.softmax(-1), 1)
    bound = (BODY + HEAD) / (BODY / DEPTH + HEAD)
    reached = compare(f"flat GPT of {PLACES * DEPTH} tokens against RQ-Transformer, batch {BATCH}", flat_gpt,
                      lambda: sample(tokenizer, prior, labels))
    print(f"bound (n_body + n_head) / (n_body / D + n_head) = {bound:.2f}; reached: {reached / bound:.0%} of it")


if __name__ == "__main__":
    main()
