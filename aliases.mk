# The targets of the first LatentForge, as aliases: each is one command of `latentforge`, shown before it runs. What is
# not given is the recipe's own. `make K=8` and `K=8 make` are the same; STEPS, EPOCHS and BATCH_SIZE are read by the
# command itself from the environment. A `$` in PROMPT is a `$`.
#
#   K D               data.chunk, autoencoder.latent                SEED              seed of the runs, or of the text
#   STEPS EPOCHS      of the run that is trained, one of them       KD_W MSE_W CE_W   latent.{token_kd,mse,ce}_weight
#   BATCH_SIZE        of the run that is trained                    PROMPT MAX_TOKENS TEMP TOP_P   of infer
#   LATENT            folder of infer, serve and bench; the newest student below runs/ or EVIDENCE_DIR   PORT   of a server
#   RECIPE            recipe or file of the train- targets          DATA              data.corpus: for Venice, its prompts
#   PROCESSES         of the train-student-deepspeed targets, on each host: one a GPU; 1 if not given
#   PROMPTS_FILE      of bench                                      RESULTS           folder of its report; results/ if not given
.PHONY: check-api toy train-ae train-student train-student-venice train-student-vllm-local train-student-vllm-remote \
        train-student-deepspeed train-student-deepspeed-zero3 serve-vllm-local infer serve bench test-e2e

RECIPE       ?= smoke-latent
PROMPTS_FILE ?= prompts.txt
KEPT          = $(or $(EVIDENCE_DIR),runs)
NEWEST        = $(shell ls -t '$(KEPT)'/*/out/student/student.json 2> /dev/null | sed -n '1s,/student.json$$,,p')
LATENT       ?= $(or $(NEWEST),$(error there is no latent student below $(KEPT)/: make train-student, or say LATENT=FOLDER))
LATENTFORGE  := $(BIN)/latentforge

PROMPT       ?= import os
override export PROMPT := $(value PROMPT)

# $(call given,VARIABLE,words) are the words where the variable has a value, and nothing where it has none.
given   = $(if $($(1)),$(2))
codec   = $(call given,DATA,--set 'data.corpus=$(DATA)') $(call given,K,--set 'data.chunk=$(K)') $(call given,D,--set 'autoencoder.latent=$(D)') \
          $(call given,SEED,--set 'seed=$(SEED)')
student = $(codec) $(call given,KD_W,--set 'latent.token_kd_weight=$(KD_W)') \
          $(call given,MSE_W,--set 'latent.mse_weight=$(MSE_W)') $(call given,CE_W,--set 'latent.ce_weight=$(CE_W)')
spread  = $(call given,PROCESSES,--set 'latent.processes=$(PROCESSES)')
go      = $(LATENTFORGE) dispatch go $(RECIPE)

check-api: setup  ## asks the teacher that the environment names (TEACHER_BACKEND, VENICE_API_KEY, VLLM_REMOTE_URL): models, rows, tokens
	$(LATENTFORGE) teacher check

toy: setup  ## the whole latent line with toy sizes, in seconds
	$(LATENTFORGE) dispatch go tiny-latent $(call given,K,--set 'data.chunk=$(K)') $(call given,SEED,--set 'seed=$(SEED)')

train-ae: setup  ## the codec of RECIPE: K, D, STEPS or EPOCHS, BATCH_SIZE, SEED
	$(go) --set through=autoencoder $(codec)

train-student: setup  ## the latent student of RECIPE, and all that it needs: also KD_W, MSE_W, CE_W
	$(go) $(student)

train-student-venice: setup  ## the same from the answers of Venice: TEACHER_REPO is the tokenizer of VENICE_MODEL
	TEACHER_BACKEND=venice $(go) --set data.documents=chat --set score.k=20 --set latent.sample_weight=0 \
	    --set latent.tempered_weight=0 --set bench.temperature=1 $(student)

train-student-vllm-local: setup  ## the same from VLLM_LOCAL_MODEL, served by a vLLM that is started for it
	TEACHER_BACKEND=vllm-local $(go) $(student)

train-student-vllm-remote: setup  ## the same from a vLLM at VLLM_REMOTE_URL; TEACHER_REPO is its tokenizer
	TEACHER_BACKEND=vllm-remote $(go) $(student)

train-student-deepspeed: setup $(VENV)/.deepspeed  ## the same as train-student, its optimiser's states and gradients sharded by ZeRO-2: PROCESSES
	$(go) --set latent.distributed=deepspeed-zero2 $(spread) $(student)

train-student-deepspeed-zero3: setup $(VENV)/.deepspeed  ## the same, its weights sharded too, by ZeRO-3: PROCESSES
	$(go) --set latent.distributed=deepspeed-zero3 $(spread) $(student)

# Not in constraints/cpu.txt: a host that does not ask for it is not given it.
$(VENV)/.deepspeed: constraints/dev.txt $(VENV)/.packages
	@$(PIP) install --quiet -c constraints/cpu.txt -c constraints/dev.txt deepspeed
	@touch $@

serve-vllm-local: setup  ## serves VLLM_LOCAL_MODEL with vLLM on PORT, for this machine alone
	$(LATENTFORGE) teacher serve "$${VLLM_LOCAL_MODEL:?names the folder of the model}" $(call given,PORT,--port '$(PORT)')

infer: setup  ## writes on from PROMPT with LATENT: MAX_TOKENS, TEMP, TOP_P, SEED
	@$(LATENTFORGE) generate $(call given,MAX_TOKENS,--max-tokens '$(MAX_TOKENS)') $(call given,TEMP,--temperature '$(TEMP)') \
	    $(call given,TOP_P,--top-p '$(TOP_P)') $(call given,SEED,--seed '$(SEED)') -- '$(LATENT)' "$$PROMPT"

serve: setup  ## an OpenAI-compatible server of LATENT on PORT of this machine
	$(LATENTFORGE) serve '$(LATENT)' $(call given,PORT,--port '$(PORT)')

bench: setup  ## how fast LATENT writes on from PROMPTS_FILE: MAX_TOKENS, TEMP, SEED, RESULTS
	$(LATENTFORGE) bench generate '$(LATENT)' --prompts '$(PROMPTS_FILE)' $(call given,MAX_TOKENS,--max-tokens '$(MAX_TOKENS)') \
	    $(call given,TEMP,--temperature '$(TEMP)') $(call given,SEED,--seed '$(SEED)') $(call given,RESULTS,--out '$(RESULTS)')

test-e2e: $(VENV)/.dev setup  ## the tests that go the whole line: dispatch, every run, verdicts, text
	$(BIN)/python -m pytest tests/dispatch/test_whole_line.py tests/train/test_latent.py tests/train/test_bench_run.py
